"""What LangChain's class OpenAI, as it is on the registry, gets from a server: `langchain_llm.py URL CASE` prints it.

CASE is JSON: {"prompts": texts, "n_tokens", "stop"}. Run by tests/test_stock_clients.py in an environment of its own.
"""

import asyncio
import json
import sys

from langchain_core.prompts import PromptTemplate
from langchain_openai import OpenAI

url, case = sys.argv[1], json.loads(sys.argv[2])
PROMPTS = case["prompts"]


def model(**more):
    connection = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}
    return OpenAI(model="tiny", temperature=0, max_tokens=case["n_tokens"], **connection, **more)


async def in_async():
    invoked = await asyncio.gather(*map(llm.ainvoke, PROMPTS))
    streamed = ["".join([piece async for piece in llm.astream(prompt)]) for prompt in PROMPTS]
    return invoked, streamed, await llm.abatch(PROMPTS)


llm = model()
chain = PromptTemplate.from_template("{prompt}") | llm
ainvoked, astreamed, abatched = asyncio.run(in_async())
generated = model(logprobs=2).generate(PROMPTS)  # all of them in one request
print(
    json.dumps(
        {
            "greedy": {
                "invoke": [llm.invoke(prompt) for prompt in PROMPTS],
                "stream": ["".join(llm.stream(prompt)) for prompt in PROMPTS],
                "batch": llm.batch(PROMPTS),
                "generate": [choices[0].text for choices in generated.generations],
                "streaming": [model(streaming=True).invoke(prompt) for prompt in PROMPTS],
                "chain": [chain.invoke({"prompt": prompt}) for prompt in PROMPTS],
                "ainvoke": ainvoked,
                "astream": astreamed,
                "abatch": abatched,
            },
            "stopped": llm.invoke(PROMPTS[0], stop=case["stop"]),
            "usage": generated.llm_output["token_usage"],
            "logprobs": [choices[0].generation_info["logprobs"]["token_logprobs"] for choices in generated.generations],
        }
    )
)
