"""What openai-python, as it is on the registry, gets from a server: `openai_v1.py URL CASE` prints it as JSON.

CASE is JSON: {"prompts": texts, "ids": the same as ids, "n_tokens", "stop", "banned": an id, "too_long": ids}.
Run by tests/test_stock_clients.py in an environment of its own.
"""

import asyncio
import json
import sys

import openai

url, case = sys.argv[1], json.loads(sys.argv[2])
PROMPTS, IDS = case["prompts"], case["ids"]
GREEDY = {"model": "tiny", "max_tokens": case["n_tokens"], "temperature": 0}
SAMPLED = {"model": "tiny", "max_tokens": case["n_tokens"], "temperature": 1.5, "top_p": 0.9, "n": 3, "seed": 7}
SAMPLED["extra_body"] = {"ignore_eos": True}
connection = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}
client = openai.OpenAI(**connection)
create = client.completions.create


def whole(completion):
    assert completion.object == "text_completion"
    assert completion.model == "tiny"
    choices = sorted(completion.choices, key=lambda choice: choice.index)
    return {
        "texts": [choice.text for choice in choices],
        "finish": [choice.finish_reason for choice in choices],
        "usage": completion.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}),
    }


def joined(chunks, n_choices):
    """A stream's chunks as `whole` gives them, and its log-probabilities."""
    texts, finish, logprobs = [""] * n_choices, [None] * n_choices, [[] for _ in range(n_choices)]
    chunks = list(chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    for chunk in chunks[:-1]:
        assert chunk.object == "text_completion"
        assert chunk.usage is None
        for choice in chunk.choices:
            assert finish[choice.index] is None, "nothing follows a finish reason"
            texts[choice.index] += choice.text
            finish[choice.index] = choice.finish_reason
            logprobs[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    assert chunks[-1].choices == [], "the last one holds the usage alone"
    usage = chunks[-1].usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"})
    return {"texts": texts, "finish": finish, "usage": usage}, logprobs


def stream(n_choices, **asked):
    return joined(create(stream=True, stream_options={"include_usage": True}, **asked), n_choices)


def refusal(**asked):
    try:
        create(**{**GREEDY, "prompt": PROMPTS[0], **asked})
    except openai.APIStatusError as error:
        return {"class": type(error).__name__, "status": error.status_code, **error.body}


async def at_once():
    async with openai.AsyncOpenAI(**connection) as other:

        async def streamed(prompt):
            return "".join(
                [
                    chunk.choices[0].text
                    async for chunk in await other.completions.create(prompt=prompt, stream=True, **GREEDY)
                ]
            )

        return await asyncio.gather(*map(streamed, PROMPTS))


def left():
    """The client of a stream goes after its first chunk; the next request is answered as ever."""
    with create(prompt=PROMPTS[0], stream=True, **{**GREEDY, "max_tokens": case["n_tokens"] * 4}) as chunks:
        next(iter(chunks))
    return whole(create(prompt=PROMPTS, **GREEDY))


scored = create(prompt=IDS, echo=True, logprobs=3, **{**GREEDY, "max_tokens": 0})
echoed = create(prompt=PROMPTS, echo=True, logprobs=3, **GREEDY)
stopped, _ = stream(1, prompt=PROMPTS[0], stop=case["stop"], **GREEDY)
with_logprobs, streamed_logprobs = stream(len(PROMPTS), prompt=PROMPTS, logprobs=0, **GREEDY)
answers = {
    "models": [model.id for model in client.models.list()],
    "model": client.models.retrieve("tiny").id,
    "greedy": {
        "texts": whole(create(prompt=PROMPTS, **GREEDY)),
        "ids": whole(create(prompt=IDS, **GREEDY)),
        "streamed": stream(len(PROMPTS), prompt=PROMPTS, **GREEDY)[0],
        "with logprobs": with_logprobs,
        "after one that left": left(),
    },
    "alone": [create(prompt=prompt, **GREEDY).choices[0].text for prompt in PROMPTS],
    "at once": asyncio.run(at_once()),
    "streamed logprobs": streamed_logprobs,
    "echoed": [choice.model_dump() for choice in echoed.choices],
    "scored": [choice.model_dump() for choice in scored.choices],
    "sampled": [
        whole(create(prompt=PROMPTS[0], **SAMPLED)),
        whole(create(prompt=PROMPTS[0], **SAMPLED)),
        stream(3, prompt=PROMPTS[0], **SAMPLED)[0],
    ],
    "stopped": [whole(create(prompt=PROMPTS[0], stop=case["stop"], **GREEDY)), stopped],
    "banned": whole(create(prompt=PROMPTS[0], logit_bias={str(case["banned"]): -100}, **GREEDY)),
    "top_k": [
        create(prompt=prompt, **{**GREEDY, "temperature": 1}, extra_body={"top_k": 1, "ignore_eos": True})
        .choices[0]
        .text
        for prompt in PROMPTS
    ],
    "refusals": {
        "model": refusal(model="tinny"),
        "max_tokens": refusal(max_tokens=-1),
        "prompt": refusal(prompt=case["too_long"]),
        "streamed": refusal(prompt=case["too_long"], stream=True),
    },
}
print(json.dumps(answers))
