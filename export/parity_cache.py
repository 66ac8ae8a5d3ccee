"""The parity gate of the cache: a prompt in two parts, the first one's keys and values out of a pool, against it whole.

Called by export/parity.py for graphs with bundle.CACHE; the bound is that of the graph's precision.
"""

from __future__ import annotations

import numpy as np

from actuary import GateFailed
from export import bundle
from export.parity_float32 import REPORT_IT, prompts_of
from export.prompt_runs import Run, feed, in_batches
from models.decoder import Decoder


def check_cache(decoder: Decoder, run: Run, seed: int, bound: float) -> None:
    """Prompts in two parts, the first one's keys and values out of a pool, against the same in one: logits, those of
    `rows` too, and what the cache keeps, within `bound` of the largest; GateFailed names the first that is not."""
    rng = np.random.default_rng(seed)
    for prompts in in_batches(prompts_of(decoder, rng)):
        whole, kept = run([bundle.LOGITS, bundle.PRESENT], feed(prompts))
        cuts = [int(rng.integers(0, len(prompt))) for prompt in prompts]
        begun = [(prompt, cut) for prompt, cut in zip(prompts, cuts, strict=True) if cut]
        if not begun:
            continue
        (present,) = run([bundle.PRESENT], feed([prompt[:cut] for prompt, cut in begun]))
        # In a pool of more slots than are used, in any order; what stands elsewhere must not be read.
        slots = rng.permutation(2 * sum(cuts))
        pool = np.full((len(present), len(slots), present.shape[-1]), 1e3, dtype=np.float32)
        pool[:, slots[: sum(cuts)]] = present
        past_slots, used = np.zeros((len(cuts), max(cuts)), dtype=np.int64), 0
        for row, cut in zip(past_slots, cuts, strict=True):
            row[:cut], used = slots[used : used + cut], used + cut
        rest = [prompt[cut:] for prompt, cut in zip(prompts, cuts, strict=True)]
        ends = np.cumsum([len(part) for part in rest])
        feeds = feed(rest) | {bundle.PAST: pool, bundle.PAST_SLOTS: past_slots, bundle.PAST_LENGTHS: np.array(cuts)}
        parted, new = run([bundle.LOGITS, bundle.PRESENT], feeds | {bundle.ROWS: ends - 1})
        starts = np.cumsum([0, *map(len, prompts)])
        own = [np.arange(start + cut, start + len(p)) for p, cut, start in zip(prompts, cuts, starts, strict=False)]
        of_kept = float(np.abs(new - kept[:, np.concatenate(own)]).max() / np.abs(kept).max())
        scale = np.abs(whole).max(axis=-1, keepdims=True)
        errors = np.maximum(*(np.abs(part - whole).max(axis=-1) / scale[:, 0] for part in np.split(parted, 2)))
        if not (errors.max() <= bound and of_kept <= bound):
            at = int(errors.argmax())
            raise GateFailed(
                f"{decoder.name!r} misses parity: after a prompt of {len(prompts[at])} tokens (seed {seed}), of them "
                f"{cuts[at]} cached, the logits differ from those without by {errors[at]:.2g} of the largest, "
                f"keys and values by {of_kept:.2g}, allowed {bound:.2g}; {REPORT_IT}"
            )
