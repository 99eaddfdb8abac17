"""Apply BPE merges to ids, with a loop for short words and a heap for long words. Learn merges."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from miniclip.text.symbols import Pair

GONE = -(2**40)  # marks a deleted id; a pair with this mark never has a rank
LONG = 32
"""For more ids than this, the heap (n log n steps) is faster than the loop (n squared steps)."""


class Merger:
    """Apply merges to ids. A pair is stored as one number, because tuples are slower as dict keys.

    >>> vocab = {"c": 0, "a": 1, "t</w>": 2, "at</w>": 3, "cat</w>": 4}
    >>> Merger(vocab, [("a", "t</w>"), ("c", "at</w>")])([0, 1, 2])
    [4]
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[Pair]) -> None:
        self.size, self.no_rank = len(vocab), len(merges)  # every rank is below no_rank
        self.joined = [vocab[left + right] for left, right in merges]  # indexed by rank
        pairs = [vocab[left] * self.size + vocab[right] for left, right in merges]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """Join the leftmost pair with the lowest rank, and repeat until no pair has a rank."""
        if len(ids) > LONG:
            return self.merge_long(ids)
        ids, size, no_rank, rank = [*ids], self.size, self.no_rank, self.ranks.get
        found = [rank(left * size + right, no_rank) for left, right in zip(ids, ids[1:])]
        while found and (best := min(found)) < no_rank:
            i = found.index(best)
            ids[i] = self.joined[best]
            del ids[i + 1], found[i]  # the two neighbouring pairs change too
            if i < len(found):
                found[i] = rank(ids[i] * size + ids[i + 1], no_rank)
            if i:
                found[i - 1] = rank(ids[i - 1] * size + ids[i], no_rank)
        return ids

    def merge_long(self, ids: Sequence[int]) -> list[int]:
        """Do the same as `__call__`, with a heap of pairs over a linked list of ids."""
        ids, end = [*ids], len(ids)
        after = list(range(1, end + 1))
        before = list(range(-1, end - 1))
        heap: list[tuple[int, int]] = []

        def push(left: int, right: int) -> None:
            if left >= 0 and right < end:
                rank = self.ranks.get(ids[left] * self.size + ids[right])
                if rank is not None:
                    heapq.heappush(heap, (rank, left))

        for i in range(end - 1):
            push(i, i + 1)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            # Skip the pair if one of its ids was merged after `push`. Then the two ids are another
            # pair with another rank or no rank, because no two pairs have the same rank.
            if j == end or self.ranks.get(ids[i] * self.size + ids[j]) != rank:
                continue
            ids[i], ids[j] = self.joined[rank], GONE
            after[i] = after[j]
            if after[i] < end:
                before[after[i]] = i
            push(before[i], i)
            push(i, after[i])
        return [id for id in ids if id != GONE]


def learn_merges(counts: Mapping[tuple[str, ...], int], limit: int) -> list[Pair]:
    """Learn at most `limit` merges from words. `counts` maps a word's symbols to the word's count.

    Sennrich et al. 2016, arXiv 1508.07909: make the most frequent pair a token, and repeat. If two
    pairs are equally frequent, the first pair in sorted order becomes a token.

    >>> learn_merges({("c", "a", "t"): 2, ("h", "a", "t"): 1, ("c", "a", "p"): 1}, 2)
    [('a', 't'), ('c', 'at')]
    """
    words: list[Sequence[str]] = list(counts)
    times = list(counts.values())
    total: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)  # words that have or once had the pair
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            total[pair] += times[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in total.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    made: set[str] = set()
    while heap and len(merges) < limit:
        count, best = heapq.heappop(heap)
        # The heap may have several counts of a pair, and only the latest count is valid. If two
        # pairs make the same token, skip the second, because a token must not have two ids.
        if count == 0 or -count != total[best] or "".join(best) in made:
            continue
        merges.append(best)
        made.add("".join(best))
        changed = set()
        for i in where.pop(best):
            old, new = words[i], join(words[i], *best)
            for pair in zip(old, old[1:]):
                total[pair] -= times[i]
                changed.add(pair)
            for pair in zip(new, new[1:]):
                total[pair] += times[i]
                where[pair].add(i)
                changed.add(pair)
            words[i] = new
        for pair in changed:
            heapq.heappush(heap, (-total[pair], pair))
    return merges


def join(symbols: Sequence[str], left: str, right: str) -> list[str]:
    """Join `left` and `right` into one symbol wherever `right` follows `left`.

    >>> join("aaab", "a", "a")
    ['aa', 'a', 'b']
    """
    joined: list[str] = []
    for symbol in symbols:
        if symbol == right and joined and joined[-1] == left:
            joined[-1] += right
        else:
            joined.append(symbol)
    return joined
