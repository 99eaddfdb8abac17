"""Why two CLIPs differ at a site: CLIP once more, as formulas, with the usual faults planted.

Up to the first site that differs, two models have computed the same. That site is computed again
by its formula, and once more with each fault that is common in reimplementations. The fault that
gives the other model's numbers is the cause.
"""

from miniclip.parity.faults import faults
from miniclip.parity.formulas import Side, compute, is_near, parts_of
from miniclip.parity.relations import otherwise_run, place_of, relation_of
from miniclip.parity.stages import NAMES
from miniclip.parity.weights import differing_weights


def cause_in_model(site: str, model: Side, other: Side) -> str:
    """The change to one model's formula for a site that gives the other's tensor there, in words.

    The site is the first that differs. The text is empty if no cause is known. If only the weights
    differ, the report describes `model` as the changed one.
    """
    if ".blocks." in site:  # two rows of the batch are enough
        model, other = (
            side._replace(tensors={name: tensor[:2] for name, tensor in side.tensors.items()})
            for side in (model, other)
        )
    ours, theirs = model.tensors[site], other.tensors[site]
    for name, tensor in zip(NAMES, (ours, theirs)):
        if not tensor.isfinite().all():
            return f"{name} has numbers that are not finite"
    if "." not in site and site != "logits":  # the output beside the logits
        rest = {name: x for name, x in other.tensors.items() if name.endswith("_embeds")}
        relation = relation_of(site, rest, theirs, ours)
        return f"model has {relation}" if relation else ""
    stream_enters = site.endswith((".resid_pre", ".pooled"))
    if stream_enters and (otherwise := otherwise_run(site, model, other)):
        return otherwise
    followers = []  # the models that compute CLIP's formula with their own weights and config
    related = ""
    for source, target, names in ((other, model, NAMES[::-1]), (model, other, NAMES)):
        x, w, o = parts_of(site, source)
        wrong = target.tensors[site]
        right = compute(site, x, w, o)
        if right is None or not is_near(right, source.tensors[site]):
            continue
        followers.append(names[0])
        for fault, weights, options in faults(site, source, target, x, w, o):
            found = compute(site, x, weights, options)
            if is_near(found, wrong) and not is_near(found, right):
                return f"{names[1]} has {fault}"
        if not related and (relation := relation_of(site, x, right, wrong)):
            related = f"{names[1]} has {relation}"
    if otherwise := otherwise_run(site, model, other):
        return otherwise
    if len(followers) == 2 and (differing := differing_weights(site, model, other)):
        return differing
    if related:
        return related
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)} in model, {tuple(theirs.shape)} in other"
    if len(followers) == 1:
        name = NAMES[followers == ["model"]]
        place = place_of(ours, theirs, model.tensors["ids"] if site == "text.embeddings" else None)
        return f"{name} does not compute CLIP's formula with its own weights{place}"
    return ""
