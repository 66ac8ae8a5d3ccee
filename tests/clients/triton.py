"""What tritonclient, as it is on the registry, gets from a server: `triton.py HOST:PORT` prints it as JSON.

Run by tests/test_inference_protocol.py in an environment of its own.
"""

import json
import sys

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

IDS = np.array([[5, 6, 7], [8, 9, -1]])  # the last is padding
LENGTHS = np.array([3, 2])


def tensors(binary):
    inputs = [triton.InferInput("input_ids", IDS.shape, "INT64"), triton.InferInput("lengths", LENGTHS.shape, "INT64")]
    inputs[0].set_data_from_numpy(IDS, binary_data=binary)
    inputs[1].set_data_from_numpy(LENGTHS, binary_data=binary)
    return inputs


def numbers(result, *names):
    return {name: result.as_numpy(name).tolist() for name in names}


every = ("logits", "softmax", "sigmoid")
answers = {}
with triton.InferenceServerClient(sys.argv[1]) as client:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("gelu")
    assert client.is_model_ready("gelu", "1")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("gelu", "1")
    assert [tensor["name"] for tensor in metadata["outputs"]] == list(every)

    result = client.infer("gelu", tensors(True), request_id="mine")
    assert result.get_response()["id"] == "mine"
    answers["binary"] = numbers(result, *every)
    wanted = [triton.InferRequestedOutput(name, binary_data=False) for name in every]
    answers["json"] = numbers(client.infer("gelu", tensors(False), outputs=wanted, model_version="1"), *every)
    mixed = [triton.InferRequestedOutput("softmax"), triton.InferRequestedOutput("logits", binary_data=False)]
    result = client.infer("gelu", tensors(True), outputs=mixed)
    answers["mixed"] = numbers(result, "softmax", "logits")
    assert result.as_numpy("sigmoid") is None
    for encoding in ("gzip", "deflate"):
        result = client.infer(
            "gelu",
            tensors(True),
            request_compression_algorithm=encoding,
            response_compression_algorithm=encoding,
        )
        answers[encoding] = numbers(result, *every)
    answers["async"] = numbers(client.async_infer("gelu", tensors(True)).get_result(), *every)

    try:
        client.infer("gelu", tensors(True)[1:])
    except InferenceServerException as error:
        answers["refusal"] = [error.status(), error.message()]
print(json.dumps(answers))
