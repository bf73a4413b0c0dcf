"""
Items of different lengths in packs of a bounded total: prompts of a rollout, completions of an update.
Copy it freely.
"""


def pack_sizes(sizes, max_tokens):
    """
    Splits items into packs of consecutive ones with at most max_tokens in all; a larger item gets a
    pack of its own.

    sizes     list of int, tokens of each item
    returns   list of lists of indices
    """
    packs = []
    free_tokens = -1
    for i, size in enumerate(sizes):
        if size > free_tokens:
            packs.append([])
            free_tokens = max_tokens
        packs[-1].append(i)
        free_tokens -= size
    return packs
