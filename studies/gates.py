"""Claim 11: sigmoid confined to gates and to binary or multi-label outputs is fine.

Source: 000, 004. Refuted by a sigmoid gate that loses what a sigmoid in every hidden unit loses, by sigmoids that rank
or are calibrated worse on a multi-label question than softmax is, or rank no better than the ids' own frequencies, or
by a service that answers other sigmoids.

Two uses, on the small GPT. A gate: glu's feed-forward block, whose gate is a sigmoid, against relu, gelu and sigmoid on
the same batches. A multi-label output: "which tokens occur among the next 8" has about seven right answers, which
sigmoids can give at once; one net is trained for it, exported, served by a process of its own and asked over HTTP.
Beside it stand the net trained with softmax on the next token, its p read as 1 - (1 - p)^8, and the ids' own
frequencies.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import label_ranking_average_precision_score
from torch import Tensor

from export.bundle import Manifest
from export.exporter import Checkpoint, export_bundle
from models.activations import get
from models.corpus import Corpus, Ids
from models.gpt import ActuaryGPT
from models.quality import WINDOWS, ece_of, reliability
from models.train import Recipe
from studies import head
from studies.served import Ask, serving
from studies.small_gpt import (
    AHEAD,
    SHARED,
    Job,
    held_out_windows,
    measure_all,
    tokens_per_byte,
    train,
    within,
    within_frequency,
)
from studies.spread import line_of, shown, spread_of
from studies.study import Cell, Chart, Claim, Figure, Finding, Options, Table, Verdict, of_few

CLAIM = Claim(
    number=11,
    name="gates",
    title="Sigmoid is fine in gates and in multi-label outputs",
    statement="Confined to gates and to binary or multi-label outputs, sigmoid is fine.",
    source="000, 004",
    refuted_by="a sigmoid gate that loses what sigmoid units lose, sigmoids that answer a multi-label question worse "
    "than softmax or frequencies alone do, or a service that answers other sigmoids than torch's.",
)

BLOCKS = ("glu", "relu", "gelu", "sigmoid")
LABELS = Job(objective="within")
NEXT = Job(objective="softmax")
READINGS = {"within": "sigmoid head, multi-label", "softmax": "softmax of the next token", "": "frequencies alone"}
SEEDS, STEPS, TOKENS, PROMPTS = 3, 600, 16_384, 64
QUICK_SEEDS, QUICK_STEPS, QUICK_TOKENS, QUICK_PROMPTS = 1, 100, 4096, 16
FINE = 0.1  # a gate is fine where it loses to ReLU at most a tenth of what sigmoid units lose
BUNDLE = f"gelu-within-{AHEAD}"
PROMPT_TOKENS = 64
ROUNDING = 2.0**-24  # of a sigmoid to float32


@dataclass(frozen=True)
class Answers:
    """What scores [N, V] for "occurs among the next 8" are worth.

    Args:
        precision: label-ranking average precision: of each right id, the share of right ids among those ranked as high,
            averaged over a position's right ids, then over positions.
        bits: binary cross-entropy per position, summed over the vocabulary.
        ece: of the AHEAD likeliest ids of each position; bins: theirs.
        expected, found: ids per position, as the scores say by their sum and as there were.
    """

    precision: float
    bits: float
    ece: float
    expected: float
    found: float
    bins: NDArray[np.float64]


def answers(log_yes: Tensor, log_no: Tensor, labels: Tensor) -> Answers:
    """Of log p and log (1 - p), [N, V] each, and the labels 0 or 1."""
    p = log_yes.exp()
    nats = -float((torch.where(labels > 0, log_yes, log_no)).double().sum()) / len(labels)
    confidence, which = p.topk(AHEAD, dim=-1)
    bins = reliability(confidence.flatten().numpy(), labels.gather(1, which).flatten().numpy() > 0)
    return Answers(
        precision=float(label_ranking_average_precision_score(labels.numpy(), p.numpy())),
        bits=nats / math.log(2),
        ece=ece_of(bins),
        expected=float(p.double().sum(-1).mean()),
        found=float(labels.sum(-1).mean()),
        bins=bins,
    )


def mean_answers(parts: Sequence[Answers], sizes: Sequence[int]) -> Answers:
    """Of all positions, from those of parts of them."""
    share = np.array(sizes) / sum(sizes)
    means = {
        name: float(np.dot(share, [getattr(part, name) for part in parts]))
        for name in ("precision", "bits", "expected", "found")
    }
    bins = np.sum([part.bins for part in parts], axis=0)
    return Answers(ece=ece_of(bins), bins=bins, **means)


def logs_of(logits: Tensor, head_kind: str) -> tuple[Tensor, Tensor]:
    """log p and log (1 - p) that an id is among the next AHEAD. A sigmoid head says it; of softmax's p, as if it held
    for each of the AHEAD draws, 1 - p' = (1 - p)^AHEAD."""
    if head_kind == "sigmoid":
        return F.logsigmoid(logits), F.logsigmoid(-logits)
    p = logits.double().softmax(-1)  # float64: a p of 1 - 1e-9 has a log (1 - p)
    return logs_of_each(p)


def logs_of_each(p: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a p per draw, float64, below 1."""
    log_no = AHEAD * torch.log1p(-p.clamp(max=1 - 1e-15))
    return torch.log(-torch.expm1(log_no)).float(), log_no.float()


def measure(model: ActuaryGPT, ids: Ids, tokens: int) -> Answers:
    """Of held-out text, from a net with either head."""
    T, V = model.config.context, model.config.vocab_size
    parts = []
    batches = torch.split(held_out_windows(ids, T, tokens, AHEAD), WINDOWS)
    for batch in batches:
        logits = model.logits(model.hidden_states(batch[:, :T])).flatten(0, 1)
        parts.append(answers(*logs_of(logits, model.config.head), within(batch, V).flatten(0, 1)))
    return mean_answers(parts, [len(batch) for batch in batches])


def frequencies(ids: Ids, T: int, V: int, tokens: int) -> Answers:
    """The same of the frequencies on the training text, which see no prompt."""
    p = torch.from_numpy(within_frequency(ids.train, V))
    batches = torch.split(held_out_windows(ids, T, tokens, AHEAD), WINDOWS)
    parts = []
    for batch in batches:
        labels = within(batch, V).flatten(0, 1)
        yes, no = (each.float().expand_as(labels) for each in (p.log(), torch.log1p(-p)))
        parts.append(answers(yes, no, labels))
    return mean_answers(parts, [len(batch) for batch in batches])


@dataclass(frozen=True)
class Served:
    """What the service's sigmoids are, beside torch's on the same prompts.

    Args:
        worst: largest difference of a sigmoid, over all prompts and ids.
        bound: of it: sigmoid's slope is at most 1/4, and export's gate bounds a logit's error by a share of its row's
            largest logit.
        chosen: the largest difference between an id asked for by name and the same id in the whole list.
        precision: of the served sigmoids on these prompts; torch_precision: of torch's.
    """

    prompts: int
    worst: float
    bound: float
    chosen: float
    precision: float
    torch_precision: float


def ask_service(model: ActuaryGPT, manifest: Manifest, texts: Tensor, ask: Ask) -> Served:
    """Asks for every id of each prompt of [N, T + AHEAD], and by name for those that came next."""
    T, V = texts.shape[1] - AHEAD, model.config.vocab_size
    labels = within(texts, V)[:, -1].numpy()  # after the prompt's last token
    served, chosen = np.zeros((len(texts), V), np.float32), 0.0
    for row, text in enumerate(texts.tolist()):
        body = {"model": BUNDLE, "prompt": text[:T], "top_k": V, "tokens": sorted(set(text[T:]))}
        [result] = ask("/v1/next-token", body)["results"]
        for entry in result["top"]:
            served[row, entry["id"]] = entry["sigmoid"]
        chosen = max(chosen, *(abs(each["sigmoid"] - float(served[row, each["id"]])) for each in result["chosen"]))
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        logits = exact.logits(exact.hidden_states(texts[:, :T])[:, -1])
    ours = logits.sigmoid().numpy()
    return Served(
        prompts=len(texts),
        worst=float(np.abs(served - ours).max()),
        bound=float(0.25 * manifest.parity.bound * logits.abs().max()) + ROUNDING,
        chosen=chosen,
        precision=float(label_ranking_average_precision_score(labels, served)),
        torch_precision=float(label_ranking_average_precision_score(labels, ours)),
    )


def served(model: ActuaryGPT, corpus: Corpus, prompts: int, kept: Path) -> Served:
    """Exports the net, serves it in a process of its own, and asks for held-out prompts."""
    V, T = model.config.vocab_size, min(PROMPT_TOKENS, model.config.context)
    bundles = kept / "bundles"
    tokenizer = corpus.tokenizer(V).to_str().encode()
    _, manifest = export_bundle(Checkpoint(BUNDLE, model, tokenizer, quality=None), bundles)
    texts = held_out_windows(corpus.ids(V), T, prompts * T, AHEAD)
    with serving(bundles, kept) as ask:
        return ask_service(model, manifest, texts, ask)


def run(options: Options) -> Finding:
    recipe = Recipe(steps=options.steps or (QUICK_STEPS if options.quick else STEPS))
    tokens, prompts = (QUICK_TOKENS, QUICK_PROMPTS) if options.quick else (TOKENS, PROMPTS)
    seeds = range(options.seeds or (QUICK_SEEDS if options.quick else SEEDS))
    return found(Corpus.read(), recipe, seeds, tokens, prompts, options)


def found(corpus: Corpus, recipe: Recipe, seeds: Sequence[int], tokens: int, prompts: int, options: Options) -> Finding:
    """The study at any size. `tokens` of held-out text are asked for; the blocks are measured on four times as many."""
    nets = options.kept.parent / SHARED
    blocks = [Job(name, seed=seed) for name in BLOCKS for seed in seeds]
    heads = [dataclasses.replace(job, seed=seed) for job in (LABELS, NEXT) for seed in seeds]
    trained = len(blocks) / (len(blocks) + len(seeds))  # of the work; NEXT is gelu's block, trained by then
    measure_bits = functools.partial(head.measure, tokens=4 * tokens)
    each_bits = measure_all(
        blocks, recipe, corpus, nets, options.workers, measure_bits,
        lambda doing, share: options.report(doing, 0.95 * trained * share),
    )  # fmt: skip
    each_answers = measure_all(
        heads, recipe, corpus, nets, options.workers, functools.partial(measure, tokens=tokens),
        lambda doing, share: options.report(doing, 0.95 * (trained + (1 - trained) * share)),
    )  # fmt: skip
    options.report("export, serve and ask", 0.95)
    first = dataclasses.replace(LABELS, seed=seeds[0])
    asked = served(train(first, recipe, corpus, nets, lambda _: None), corpus, prompts, options.kept)
    ids = corpus.ids(recipe.vocab)
    per_byte = tokens_per_byte(corpus, recipe.vocab, held_out_windows(ids, recipe.context, 4 * tokens))
    bits = {
        name: [each["bits_per_token"][0] * per_byte for job, each in zip(blocks, each_bits, strict=True)
               if job.activation == name]
        for name in BLOCKS
    }  # fmt: skip
    by_head = {
        objective: [each for job, each in zip(heads, each_answers, strict=True) if job.objective == objective]
        for objective in ("within", "softmax")
    }
    alone = frequencies(ids, recipe.context, recipe.vocab, tokens)
    settings = {
        "net": f"{recipe.layers} layers, {recipe.dim} channels, {recipe.vocab} ids, context {recipe.context}",
        "training": f"{recipe.steps} steps of {recipe.batch} windows; `actuary train`'s recipe, batches paired by seed",
        "seeds": list(seeds),
        "corpus sha256": corpus.sha256[:16],
        "held-out tokens": f"{each_bits[0]['tokens']} for the blocks, {tokens} for the labels, in "
        "windows from all over the text",
        "labels": f"ids among the next {AHEAD}, summed binary cross-entropy, bias at their logit",
        "served": f"{asked.prompts} prompts of {min(PROMPT_TOKENS, recipe.context)} tokens over HTTP, all "
        f"{recipe.vocab} ids of each, fp32 on the CPU",
    }
    return conclude(bits, by_head, alone, asked, settings)


def conclude(
    bits: dict[str, list[float]],
    by_head: dict[str, list[Answers]],
    alone: Answers,
    asked: Served,
    settings: dict[str, Any],
) -> Finding:
    """The verdict, by rule: a fine gate, a fine multi-label output, the same when served; all, some or none."""
    pairs = list(zip(bits["glu"], bits["relu"], bits["sigmoid"], strict=True))
    gate = [glu - relu for glu, relu, _ in pairs]
    units = [sigmoid - relu for _, relu, sigmoid in pairs]
    gate_lost, units_lost = float(np.mean(gate)), float(np.mean(units))
    told = min(units) > 0
    fine_gate = told and gate_lost <= FINE * units_lost
    ours, rival = by_head["within"], by_head["softmax"]
    ranks = all(a.precision > max(b.precision, alone.precision) for a, b in zip(ours, rival, strict=True))
    predicts = all(a.bits < min(b.bits, alone.bits) for a, b in zip(ours, rival, strict=True))
    calibrated = all(a.ece <= b.ece for a, b in zip(ours, rival, strict=True))
    fine_labels = ranks and predicts and calibrated
    same = asked.worst <= asked.bound
    parts = (fine_gate, fine_labels, same)
    verdict: Verdict = "holds" if all(parts) else "holds in part" if any(parts) else "did not reproduce"
    precision, rival_precision = (spread_of(a.precision for a in each) for each in (ours, rival))
    ece, rival_ece = (spread_of(a.ece for a in each) for each in (ours, rival))
    lost = f"A sigmoid gate (glu) {cost(gate_lost)} ReLU, sigmoid in every unit {cost(units_lost)} it"
    if not told:
        lost += ", which at this size is not told apart in every seed"
    sentence = (
        f"{lost}. Asked which ids come among the next {AHEAD}, a sigmoid head ranks with an average precision of "
        f"{precision.text()}, softmax of the next token with {rival_precision.text()}, frequencies alone with "
        f"{shown(alone.precision)}; the ECE is {ece.text()} and {rival_ece.text()}. Served, no sigmoid differs from "
        f"torch's by more than {asked.worst:.1e}." + of_few(len(pairs))
    )
    figures = [
        Figure("glu's bits per byte over relu's, paired by seed", signed(gate), "fine", fine_gate),
        Figure("sigmoid units' bits per byte over relu's, paired by seed", signed(units)),
        Figure("average precision, sigmoid head; softmax; frequencies",
               f"{precision.text()}; {rival_precision.text()}; {shown(alone.precision)}", "fine", ranks),
        Figure("bits per position, sigmoid head; softmax; frequencies",
               "; ".join([*(spread_of(a.bits for a in each).text() for each in (ours, rival)), shown(alone.bits)]),
               "fine", predicts),
        Figure(f"ECE of the {AHEAD} likeliest, sigmoid head; softmax", f"{ece.text()}; {rival_ece.text()}", "fine",
               calibrated),
        Figure("largest difference of a served sigmoid from torch's in float64", f"{asked.worst:.1e}",
               f"at most {asked.bound:.1e} (our gate's)", same),
    ]  # fmt: skip
    return Finding(
        verdict=verdict,
        sentence=sentence,
        figures=figures,
        settings=settings,
        tables=[_blocks(bits), _labels(by_head, alone), _served(asked)],
        charts=[_bars(bits), _reliability(by_head, alone)],
        data={"digests": {name: get(name).digest for name in BLOCKS}},
    )


def cost(lost: float) -> str:
    return f"costs {lost:.3f} bits per byte over" if lost >= 0 else f"saves {-lost:.3f} bits per byte over"


def signed(values: Sequence[float]) -> str:
    spread = spread_of(values)
    ends = f" ({spread.low:+.3f} to {spread.high:+.3f})" if len(values) > 1 else " (one seed: its spread is unknown)"
    return f"{spread.median:+.3f}{ends}"


def _blocks(bits: dict[str, list[float]]) -> Table:
    rows: list[list[Cell]] = [
        [name, *(round(each, 4) for each in bits[name]), round(float(np.mean(bits[name])), 4)] for name in BLOCKS
    ]
    columns = ["activation", *(f"seed {at}" for at in range(len(bits["glu"]))), "mean"]
    note = (
        "glu's hidden width is 8C/3, so that all have as many parameters. Two seeds of one activation are on different "
        "batches; a row's differences to another are paired."
    )
    return Table("Held-out bits per byte by the feed-forward block", columns, rows, note)


def _labels(by_head: dict[str, list[Answers]], alone: Answers) -> Table:
    rows: list[list[Cell]] = []
    for objective, name in READINGS.items():
        several = by_head.get(objective, [alone])
        each = {key: spread_of(getattr(a, key) for a in several) for key in ("precision", "bits", "ece", "expected")}
        rows.append([name, *(value.text() for value in each.values()), shown(several[0].found)])
    note = (
        "Softmax's net was not trained for this question: its p is of one token, and over 8 it is read as "
        "1 - (1 - p)^8, as if all were drawn alike. Average "
        f"precision: of the ranks of a position's right ids; the ECE: of its {AHEAD} likeliest ids, in 15 bins."
    )
    return Table(
        f"Which ids occur among the next {AHEAD} tokens",
        ["scores", "average precision", "bits per position", "ECE", "ids expected", "ids found"],
        rows,
        note,
    )


def _served(asked: Served) -> Table:
    return Table(
        "Served over HTTP",
        ["prompts", "largest difference from torch", "allowed", "average precision", "the same by torch"],
        [[asked.prompts, f"{asked.worst:.1e}", f"{asked.bound:.1e}", f"{asked.precision:.4f}",
          f"{asked.torch_precision:.4f}"]],
        "`/v1/next-token` with every id, and with the ids that came next by name: these differ from the same ids in "
        f"the list by {asked.chosen:.0e}. Allowed: a quarter, sigmoid's steepest slope, of export's bound of a logit.",
    )  # fmt: skip


def _bars(bits: dict[str, list[float]]) -> Chart:
    line = line_of("", BLOCKS, [spread_of(bits[name]) for name in BLOCKS])
    note = "Bars begin at zero; the marks are the range over seeds."
    return Chart(
        "blocks", "A sigmoid gate beside sigmoid units", "feed-forward block", "held-out bits per byte", [line], "bars",
        note=note,
    )  # fmt: skip


def _reliability(by_head: dict[str, list[Answers]], alone: Answers) -> Chart:
    lines = []
    for objective, name in READINGS.items():
        bins = np.sum([a.bins for a in by_head.get(objective, [alone])], axis=0)
        lines.append(head.reliability_line(name, bins))
    lines.append(head.diagonal())
    return Chart(
        "reliability", f"Does it come as often as said? The {AHEAD} likeliest ids", "probability said",
        f"share found among the next {AHEAD}", lines, note=head.BINS_NOTE,
    )  # fmt: skip
