"""What the KServe SDK, as it is on the registry, gets from a server: `kserve_v2.py URL` prints it as JSON.

Run by tests/test_inference_protocol.py in an environment of its own.
"""

import asyncio
import json
import sys

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput

IDS = np.array([[5, 6, 7], [8, 9, -1]])  # the last is padding
LENGTHS = np.array([3, 2])
EVERY = ("logits", "softmax", "sigmoid")


def request(binary, **more):
    inputs = [InferInput("input_ids", IDS.shape, "INT64"), InferInput("lengths", LENGTHS.shape, "INT64")]
    inputs[0].set_data_from_numpy(IDS, binary_data=binary)
    inputs[1].set_data_from_numpy(LENGTHS, binary_data=binary)
    return InferRequest("gelu", inputs, request_id="mine", **more)


def numbers(response):
    assert response.id == "mine"
    assert response.model_name == "gelu"
    return {output.name: output.as_numpy().reshape(output.shape).tolist() for output in response.outputs}


async def main(url):
    answers = {}
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        assert await client.is_server_live(url)
        assert await client.is_server_ready(url)
        assert await client.is_model_ready(url, "gelu")
        assert not await client.is_model_ready(url, "nothing")
        answers["json"] = numbers(await client.infer(url, request(False), "gelu"))
        in_binary = request(True, parameters={"binary_data_output": True})
        answers["binary"] = numbers(await client.infer(url, in_binary, "gelu"))
        mixed = [RequestedOutput("softmax", {"binary_data": True}), RequestedOutput("logits")]
        answers["mixed"] = numbers(await client.infer(url, request(True, request_outputs=mixed), "gelu"))
        try:
            await client.infer(url, InferRequest("gelu", request(False).inputs[1:]), "gelu")
        except httpx.HTTPStatusError as error:
            answers["refusal"] = [str(error.response.status_code), str(error)]
    print(json.dumps(answers))


asyncio.run(main(sys.argv[1]))
