"""Clients of OpenAI's shapes as they are on the registry, against the same weights in torch; scripts in clients/."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HANG_S, serving
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from export.exporter import export_bundle

CLIENTS = Path(__file__).parent / "clients"
# Two environments, within which nothing clashes. A later langchain-core wants a certifi that the registry has not yet.
LIGHT = ("openai==3.54.0", "langchain-openai==1.7.3", "langchain-core==1.7.2")
HEAVY = ("lm_eval[api]==0.4.13", "guidellm==0.8.1", "faker==40.54.0")  # faker makes guidellm's prompts
CONTEXT = 128
LOGPROB_BOUND = 1e-3  # of a sum over a choice's tokens, as promised
TIE = 1e-4  # nearer log-probabilities may change places: two runs in float32 are within 1e-5 of each other
N_TOKENS = 8
PROMPTS = ["x = 1", "def load(fp):", "naïve é", "return x"]
WORDS = ["not None", "naïve", "x", "the é of", "import json", "is", "self.", "(fp)", "0", "yield", "…", "or"]


@dataclass(frozen=True)
class Reference:
    """The served weights in torch: log-probabilities in float64 of float32 logits."""

    model: PreTrainedModel
    tokenizer: Tokenizer

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """ids [T] -> of the token after each [T, V]."""
        return self.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def greedy(self, prompt: str, n: int = N_TOKENS) -> tuple[list[int], list[float]]:
        """The n likeliest tokens after a prompt, one after the other, and their log-probabilities."""
        ids, found = self.encode(prompt), []
        for _ in range(n):
            best = self.logprobs(ids)[-1].topk(2)
            assert best.values[0] - best.values[1] > TIE, f"a tie after {prompt!r}: take another"
            ids.append(int(best.indices[0]))
            found.append(float(best.values[0]))
        return ids[-n:], found

    def text(self, prompt: str, n: int = N_TOKENS) -> str:
        return self.tokenizer.decode(self.greedy(prompt, n)[0], skip_special_tokens=False)

    def loglikelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Of a continuation after as much of its context as fits; whether each of its tokens is the likeliest."""
        ids = (context + continuation)[-CONTEXT + 1 :]
        rows = self.logprobs(ids)[-len(continuation) - 1 : -1]
        taken = rows[range(len(continuation)), continuation]
        return float(taken.sum()), bool((taken == rows.max(-1).values).all())


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable) -> Any:
    """Random weights that have something to say: as they are made, the likeliest token is the last one again."""
    made = tiny_checkpoint("swiglu", context=CONTEXT)
    with torch.no_grad():
        for block in made.model.blocks:
            block.attention.out.weight *= 8
            block.ffn.down.weight *= 8
        made.model.norm.weight *= 4
    return made


@pytest.fixture(scope="module")
def reference(checkpoint: Any) -> Reference:
    return Reference(checkpoint.model, Tokenizer.from_str(checkpoint.tokenizer_json.decode()))


@pytest.fixture(scope="module")
def url(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    out = tmp_path_factory.mktemp("bundles")
    export_bundle(checkpoint, out, name="tiny")
    with serving(out) as (url, _):
        yield url


@pytest.fixture
def tokenizer_folder(checkpoint: Any, tmp_path: Path) -> Path:
    """The tokenizer as transformers' AutoTokenizer reads it."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(checkpoint.tokenizer_json)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return folder


def run(python: Path, *arguments: str, folder: Path) -> str:
    """What it prints; no hub is asked, and nothing is written outside `folder`."""
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
    command = [str(python), "-I", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        cwd=folder,
        env={**os.environ, **env, "HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# lm-eval: three tasks.

TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "until": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{greedy}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": N_TOKENS, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}
REMOTE = {"tokenizer_backend": "remote", "max_length": CONTEXT}
WAYS: dict[str, dict[str, Any]] = {
    "text": {**REMOTE, "tokenized_requests": False},
    "texts in batches": {**REMOTE, "tokenized_requests": False, "batch_size": 5},
    "tokens": {"max_length": CONTEXT},  # where nobody says which tokenizer, it asks for /tokenizer_info
    "tokens in batches, several at once": {**REMOTE, "batch_size": 5, "num_concurrent": 3},
    "its own tokenizer": {"tokenizer_backend": "huggingface", "max_length": CONTEXT, "num_concurrent": 4},
    "no tokenizer": {"tokenizer_backend": None, "batch_size": 5},
}
UNTIL_ONLY = ("no tokenizer",)  # without one lm-eval cannot tell where a choice begins


def documents(reference: Reference) -> list[dict[str, Any]]:
    """Twelve and one more, which with its longest choice and the token that lm-eval asks for fills the context."""
    contexts = [f"{prompt} {word}" for prompt, word in zip(PROMPTS * 3, WORDS, strict=True)]
    found = [
        {
            "context": context,
            "choices": [f" {WORDS[at]}", f" {WORDS[at - 5]}", reference.text(context, 2)],
            "answer": at % 3,
            "greedy": reference.text(context),
        }
        for at, context in enumerate(contexts)
    ]
    long, choices = "x = é;" * 100, [" import json", " é", " x"]
    while max(len(reference.encode(long + choice)) for choice in choices) > CONTEXT - 1:
        long = long[1:]
    return [*found, {"context": long, "choices": choices, "answer": 0, "greedy": ""}]


def test_lm_eval_finds_what_torch_finds(
    url: str, reference: Reference, client_python: Callable[..., Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Accuracy, log-likelihoods and greedy text, with text and with token prompts."""
    python = client_python(*HEAVY, torch=True)
    docs = documents(reference)
    for name, task in TASKS.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in (docs if name == "choices" else docs[:-1])))
        read = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **read, **task}))  # JSON is YAML
    WAYS["its own tokenizer"]["tokenizer"] = str(tokenizer_folder)
    ways = {way: {"tasks": ["until"] if way in UNTIL_ONLY else list(TASKS), "args": args} for way, args in WAYS.items()}
    script = str(CLIENTS / "lm_eval_local.py")
    answers = json.loads(run(python, script, url, str(tmp_path), json.dumps(ways), folder=tmp_path).splitlines()[-1])

    expected = []
    for doc in docs:
        context = reference.encode(doc["context"])
        wholes = [reference.encode(doc["context"] + choice) for choice in doc["choices"]]
        expected.append([reference.loglikelihood(context, whole[len(context) :]) for whole in wholes])
    assert len({greedy for each in expected for _, greedy in each}) == 2, "some choice is the likeliest text"
    right = [
        max(range(3), key=lambda at: sums[at][0]) == doc["answer"] for sums, doc in zip(expected, docs, strict=True)
    ]
    assert 0 < sum(right) < len(docs)
    rolling = [reference.loglikelihood([0], reference.encode(doc["context"]))[0] for doc in docs[:-1]]
    n_bytes = sum(len(doc["context"].encode()) for doc in docs[:-1])

    assert set(answers) == set(WAYS)
    for way, answer in answers.items():
        results, responses = answer["results"], answer["responses"]
        assert results["until"]["exact_match,none"] == 1, (way, responses["until"])
        if way in UNTIL_ONLY:
            continue
        assert results["choices"]["acc,none"] == pytest.approx(sum(right) / len(docs)), way
        for found, wanted in zip(responses["choices"], expected, strict=True):
            [sums, greedy] = zip(*((sum_, is_greedy) for [[sum_, is_greedy]] in found), strict=True)
            assert sums == pytest.approx([sum_ for sum_, _ in wanted], abs=LOGPROB_BOUND), way
            assert list(greedy) == [is_greedy for _, is_greedy in wanted], way
        assert [sum_ for [[sum_]] in responses["rolling"]] == pytest.approx(rolling, abs=LOGPROB_BOUND), way
        bits = -sum(rolling) / n_bytes / math.log(2)
        assert results["rolling"]["bits_per_byte,none"] == pytest.approx(bits, abs=LOGPROB_BOUND), way


# openai-python, LangChain, guidellm.


def first_border(reference: Reference) -> str:
    """A stop string that begins in one greedy token of the first prompt and ends in the next, not seen before it."""
    text = [reference.tokenizer.decode([id_]) for id_ in reference.greedy(PROMPTS[0])[0]]
    for at in range(2, len(text)):
        stop = text[at - 1][-1] + text[at][0]
        if "".join(text[: at + 1]).index(stop) == len("".join(text[:at])) - 1:
            return stop
    raise AssertionError(f"no border in {text}")


def top(rows: torch.Tensor, n: int) -> list[list[float]]:
    return rows.topk(n).values.tolist()


def test_openai_python_works_unmodified(
    url: str, reference: Reference, client_python: Callable[..., Path], tmp_path: Path
) -> None:
    ids = [reference.encode(prompt) for prompt in PROMPTS]
    greedy, logprobs = zip(*(reference.greedy(prompt) for prompt in PROMPTS), strict=True)
    texts = [reference.text(prompt) for prompt in PROMPTS]
    stop, n_prompt = first_border(reference), sum(map(len, ids))
    case = {
        "prompts": PROMPTS,
        "ids": ids,
        "n_tokens": N_TOKENS,
        "stop": stop,
        "banned": greedy[0][0],
        "too_long": [5] * (CONTEXT + 1),
    }
    script = str(CLIENTS / "openai_v1.py")
    answers = json.loads(run(client_python(*LIGHT), script, url, json.dumps(case), folder=tmp_path))

    assert answers["models"] == ["tiny"]
    assert answers["model"] == "tiny"
    n = N_TOKENS * len(PROMPTS)
    whole = {
        "texts": texts,
        "finish": ["length"] * len(PROMPTS),
        "usage": {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n},
    }
    for way, found in answers["greedy"].items():
        assert found == whole, way
    for way in ("alone", "at once", "top_k"):
        assert answers[way] == texts, way
    for found, wanted in zip(answers["streamed logprobs"], logprobs, strict=True):
        assert found == pytest.approx(wanted, abs=LOGPROB_BOUND)

    for echoed, scored, prompt, generated, text in zip(
        answers["echoed"], answers["scored"], PROMPTS, greedy, texts, strict=True
    ):
        assert (echoed["text"], scored["text"]) == (prompt + text, prompt)
        asked = reference.encode(prompt)
        every = asked + generated
        rows = reference.logprobs(every)
        for choice, n_tokens in ((echoed, len(every)), (scored, len(asked))):
            taken = rows[range(n_tokens - 1), every[1:n_tokens]].tolist()
            found = choice["logprobs"]
            assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
            assert found["token_logprobs"][1:] == pytest.approx(taken, abs=LOGPROB_BOUND)
            assert len(found["tokens"]) == len(found["text_offset"]) == n_tokens
            for at, best in enumerate(top(rows[: n_tokens - 1], 3)):
                named = sorted(found["top_logprobs"][at + 1].values(), reverse=True)
                assert named[:3] == pytest.approx(best, abs=LOGPROB_BOUND)
                assert found["token_logprobs"][at + 1] in named, "the identical float"

    first, again, streamed = answers["sampled"]
    assert first == again == streamed
    assert len(set(first["texts"])) > 1
    n_sampled = N_TOKENS * len(first["texts"])
    usage = {"prompt_tokens": len(ids[0]), "completion_tokens": n_sampled, "total_tokens": len(ids[0]) + n_sampled}
    assert first["usage"] == usage
    whole, streamed = answers["stopped"]
    assert whole == streamed
    assert whole["texts"] == [texts[0][: texts[0].index(stop)]]
    assert whole["finish"] == ["stop"]
    assert answers["banned"]["texts"][0] != texts[0]

    refused = answers["refusals"]
    assert {name: (error["class"], error["status"], error["param"]) for name, error in refused.items()} == {
        "model": ("NotFoundError", 404, "model"),
        "max_tokens": ("UnprocessableEntityError", 422, "max_tokens"),
        "prompt": ("UnprocessableEntityError", 422, "prompt"),
        "streamed": ("UnprocessableEntityError", 422, "prompt"),
    }
    assert "did you mean 'tiny'?" in refused["model"]["message"]
    assert str(CONTEXT) in refused["prompt"]["message"]


def test_langchain_works_unmodified(
    url: str, reference: Reference, client_python: Callable[..., Path], tmp_path: Path
) -> None:
    stop = first_border(reference)
    case = {"prompts": PROMPTS, "n_tokens": N_TOKENS, "stop": [stop]}
    script = str(CLIENTS / "langchain_llm.py")
    answers = json.loads(run(client_python(*LIGHT), script, url, json.dumps(case), folder=tmp_path))
    texts = [reference.text(prompt) for prompt in PROMPTS]
    for way, found in answers["greedy"].items():
        assert found == texts, way
    assert answers["stopped"] == texts[0][: texts[0].index(stop)]
    n_prompt, n = sum(len(reference.encode(prompt)) for prompt in PROMPTS), N_TOKENS * len(PROMPTS)
    assert answers["usage"] == {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}
    for found, prompt in zip(answers["logprobs"], PROMPTS, strict=True):
        assert found == pytest.approx(reference.greedy(prompt)[1], abs=LOGPROB_BOUND)


def test_guidellm_runs(
    url: str, reference: Reference, client_python: Callable[..., Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """It finds the model, and counts as many tokens as it asked for; at temperature 0 the text is torch's."""
    python = client_python(*HEAVY, torch=True)
    backend = {"kind": "openai_http", "target": url, "request_format": "/v1/completions"}
    backend["extras"] = {"body": {"temperature": 0}}  # type: ignore[assignment]
    n_requests, n_prompt, report = 12, 16, tmp_path / "report.json"
    asked = {
        "backend": json.dumps(backend),
        "profile": "kind=concurrent,streams=3",
        "constraint": f"kind=max_requests,count={n_requests}",
        "tokenizer": f"kind=huggingface_auto,model={tokenizer_folder}",
        "data": f"kind=synthetic_text,prompt_tokens={n_prompt},output_tokens={N_TOKENS}",
        "output": f"kind=json,path={report}",
    }
    options = [part for name, value in asked.items() for part in (f"--{name}", value)]
    run(python, "-m", "guidellm", "run", *options, "--disable-console", folder=tmp_path)
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    assert benchmark["metrics"]["request_totals"] == {
        "successful": n_requests,
        "errored": 0,
        "incomplete": 0,
        "total": n_requests,
    }
    for request in benchmark["requests"]["successful"]:
        sent = json.loads(request["request_args"])["body"]
        assert sent["model"] == "tiny"
        assert sent["stream"]
        assert (request["prompt_tokens"], request["output_tokens"]) == (n_prompt, N_TOKENS)
        assert request["output"] == reference.text(sent["prompt"])
