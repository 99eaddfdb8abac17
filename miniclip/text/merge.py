"""Apply BPE merges, with a loop for short words and a heap for long ones; and learn merges."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import inf

from miniclip.text.symbols import Pair

LONG = 32
"""Above this number of symbols the heap is faster than the loop: n log n against n squared."""


def merge(symbols: Sequence[str], ranks: Mapping[Pair, int]) -> list[str]:
    """Join the pair of the lowest rank, the leftmost first, until no pair has a rank.

    >>> merge(["c", "a", "t</w>"], {("a", "t</w>"): 0, ("c", "at</w>"): 1})
    ['cat</w>']
    """
    if len(symbols) > LONG:
        return merge_long(symbols, ranks)
    symbols = list(symbols)
    rank = ranks.get
    found = [rank(pair, inf) for pair in zip(symbols, symbols[1:])]
    while found and (best := min(found)) < inf:
        i = found.index(best)
        symbols[i] += symbols.pop(i + 1)
        del found[i]  # and the pairs beside it change
        if i < len(found):
            found[i] = rank((symbols[i], symbols[i + 1]), inf)
        if i:
            found[i - 1] = rank((symbols[i - 1], symbols[i]), inf)
    return symbols


def merge_long(symbols: Sequence[str], ranks: Mapping[Pair, int]) -> list[str]:
    """Do the same as `merge`, with a heap of pairs over a linked list of symbols."""
    symbols = list(symbols)
    end = len(symbols)
    after = list(range(1, end + 1))
    before = list(range(-1, end - 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        # The pushed pair is gone if either half has been merged since. A rank names one pair, so it
        # is enough to check that the pair at this place still has the rank.
        if j == end or ranks.get((symbols[i], symbols[j])) != rank:
            continue
        symbols[i] += symbols[j]
        symbols[j] = ""  # a pair with "" has no rank
        after[i] = after[j]
        if after[i] < end:
            before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < end:
                new = ranks.get((symbols[left], symbols[right]))
                if new is not None:
                    heapq.heappush(heap, (new, left))
    return [symbol for symbol in symbols if symbol]


def learn_merges(counts: Mapping[tuple[str, ...], int], limit: int) -> list[Pair]:
    """Learn at most `limit` merges from words, each given as symbols with its count.

    Sennrich et al. 2016, arXiv 1508.07909: the pair that occurs most becomes a token, again and
    again. Ties go to the pair that sorts first.

    >>> learn_merges({("c", "a", "t"): 2, ("h", "a", "t"): 1, ("c", "a", "p"): 1}, 2)
    [('a', 't'), ('c', 'at')]
    """
    words: list[Sequence[str]] = list(counts)
    times = list(counts.values())
    total: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)  # the words a pair is or was in
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
        # Each change of a count is pushed, and only the latest is valid. Two pairs may make one
        # token: the second pair is left out, because one token must not have two ids.
        if count == 0 or -count != total[best] or "".join(best) in made:
            continue
        merges.append(best)
        made.add("".join(best))
        changed = set()
        for i in where.pop(best):
            old, new = words[i], merge(words[i], {best: 0})
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
