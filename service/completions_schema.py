"""The shapes of `POST /v1/completions`: OpenAI's, with vLLM's additions. B prompts, V the vocabulary."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import CoreSchema

from service.errors import shown
from service.schema import Prompts, Request, without_surrogates

MAX_STOPS = 64  # each token's text is looked through for each
MAX_STOP_CHARACTERS = 256
MAX_CHOICES = 1 << 20  # of any service; each has its own limit besides
MAX_IDS = 1_024  # of logit_bias, stop_token_ids and logprob_token_ids; vLLM allows 1024 biases

# What clients send and what changes no token here: how to rank, and how many tokens a chunk may wait for.
IGNORED = (
    "metadata",
    "priority",
    "request_id",
    "session_id",
    "service_tier",
    "store",
    "cache_salt",
    "safety_identifier",
    "stream_interval",
    "truncation_side",
)
# What others offer and we do not, with the values at which it changes nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True, False),
    "truncate_prompt_tokens": (),
    "watermarking": (False,),
    "repetition_detection": (),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "logits_processors": ([],),
}
# `stop` and `logit_bias` to the document.
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[Annotated[str, Field(pattern="^[0-9]{1,18}$")], Bias], Field(max_length=MAX_IDS)]
INSTEAD = {"prompt_logprobs": "; echo with logprobs gives them", "suffix": "; only what comes after a prompt is known"}


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "must be a text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("stop", "may hold at most {most} texts", {"most": MAX_STOPS})
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise PydanticCustomError(
                "stop",
                "each text must have 1 to {most} characters; one has {has}",
                {"most": MAX_STOP_CHARACTERS, "has": len(stop)},
            )
    return list(dict.fromkeys(map(without_surrogates, stops)))


def _bias(value: Any) -> dict[int, float]:
    """{"17": -100} -> {17: -100.0}; JSON knows no keys but texts."""
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "must be an object of token ids and biases")
    if len(value) > MAX_IDS:
        raise PydanticCustomError("logit_bias", "may hold at most {most} ids", {"most": MAX_IDS})
    biases: dict[int, float] = {}
    for key, bias in value.items():
        digits = str(key)
        if not (digits.isascii() and digits.isdecimal() and len(digits) <= 18):
            raise PydanticCustomError("logit_bias", "the key {key} is no token id", {"key": shown(key)})
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise PydanticCustomError(
                "logit_bias",
                "the bias of {key} is {bias}; allowed: -100 to 100",
                {"key": digits, "bias": shown(bias)},
            )
        biases[int(digits)] = float(bias)
    return biases


def _unique(ids: list[int]) -> list[int]:
    return list(dict.fromkeys(ids))


def _finite_number(value: Any) -> Any:
    """A whole number too large for a float is refused as one, and not by an overflow."""
    if type(value) is int and abs(value) > 1e308:
        raise PydanticCustomError("number", "is too large")
    return value


Number = Annotated[float, BeforeValidator(_finite_number), Field(allow_inf_nan=False)]
Ids = Annotated[list[int], Field(max_length=MAX_IDS), AfterValidator(_unique)]


def _same(value: Any, neutral: Any) -> bool:
    """Whether they are one value in JSON, where 1.0 is 1 and no false is 0."""
    numbers = type(value) is float and type(neutral) is int
    return bool(value == neutral) and (type(value) is type(neutral) or numbers)


class StreamOptions(Request):
    include_usage: bool = Field(default=False, description="A last chunk without choices has the usage.")
    continuous_usage_stats: bool = Field(default=False, description="With it: each chunk has its choice's so far.")
    include_obfuscation: bool = Field(default=False, description="Nothing is padded here, whatever it says.")


class CompletionRequest(Request):
    """What comes after each prompt, `n` times."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "gelu", "prompt": "if x is not", "max_tokens": 8, "temperature": 0, "logprobs": 2}]
        }
    )

    model: str = Field(description="A variant's name.")
    prompt: Prompts = Field(description="One prompt or several, as text or as token ids.")
    max_tokens: int = Field(16, ge=0, description="Tokens to generate; with `echo`, 0 scores the prompt alone.")
    temperature: Number = Field(1.0, ge=0, description="0 takes the likeliest token, of equal ones the smallest id.")
    top_p: Number = Field(1.0, ge=0, le=1, description="Of the fewest likeliest tokens that have this mass together.")
    top_k: int = Field(0, ge=-1, description="Of so many likeliest tokens; 0 or -1: of all.")
    min_p: Number = Field(0.0, ge=0, le=1, description="Of those this times as likely as the likeliest.")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Choices for each prompt.")
    best_of: int | None = Field(None, description="Must be n: nothing is generated that is not answered.")
    seed: int | None = Field(
        None, ge=-(1 << 63), lt=1 << 63, description="The same seed and request give the same choices, in any batch."
    )
    stop: Annotated[list[str], PlainValidator(_stops, json_schema_input_type=Stop | Stops)] = Field(
        default=[], description=f"Up to {MAX_STOPS} texts, before the first of which a choice ends."
    )
    stop_token_ids: Ids = Field(default=[], description="Tokens that end a choice beside the end of text.")
    include_stop_str_in_output: bool = Field(False, description="The text ends with the stop instead of before it.")
    ignore_eos: bool = Field(False, description="Go on past the end of text.")
    min_tokens: int = Field(0, ge=0, description="Tokens before which nothing ends a choice.")
    skip_special_tokens: bool = Field(True, description="Special tokens have no text.")
    add_special_tokens: bool = Field(True, description="With what the tokenizer puts around a prompt of text.")
    stream: bool = Field(False, description="As server-sent events, a chunk per token, then [DONE].")
    stream_options: StreamOptions | None = None
    echo: bool = Field(False, description="The prompt first, in text and in logprobs.")
    logprobs: int | None = Field(
        None,
        ge=0,
        description="Log-probabilities of the tokens, and of so many likeliest at each place, up to V: log softmax of "
        "the logits, whatever head the variant was trained with and however it is sampled.",
    )
    logprob_token_ids: Ids | None = Field(None, description="Tokens to list at each place besides.")
    return_tokens_as_token_ids: bool = Field(False, description='Tokens are named "token_id:17" in logprobs.')
    return_token_ids: bool = Field(False, description="Choices have `token_ids`, and `prompt_token_ids` at first.")
    logit_bias: Annotated[dict[int, float], PlainValidator(_bias, json_schema_input_type=Biases)] = Field(
        default={}, description="Added to the logits of token ids before one is chosen, -100 to 100."
    )
    presence_penalty: Number = Field(0.0, ge=-2, le=2, description="Off the logit of what was generated.")
    frequency_penalty: Number = Field(0.0, ge=-2, le=2, description="The same, times how often.")
    user: str | None = Field(None, description="Who asks: with it an experiment gives them the same arm each time.")
    repetition_penalty: Number = Field(
        1.0, gt=0, le=100, description="Divides positive logits of what is in prompt or answer, multiplies others."
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        reference = super().__get_pydantic_json_schema__(core_schema, handler)
        fields = handler.resolve_ref_schema(reference)["properties"]
        fields |= {name: {"description": "Taken; it changes nothing here."} for name in IGNORED}
        for name, neutral in REFUSED.items():
            fields[name] = {"enum": [*neutral, None], "description": f"Not offered{INSTEAD.get(name, '')}."}
        return reference

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in REFUSED.items():
            value = data.get(name)
            if value is not None and not any(_same(value, each) for each in neutral):
                raise PydanticCustomError(
                    "not_offered",
                    "{name} is not offered; got {value}; leave it out{instead}",
                    {"name": name, "value": shown(value), "instead": INSTEAD.get(name, ""), "param": name},
                )
        return {name: value for name, value in data.items() if name not in REFUSED and name not in IGNORED}

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise PydanticCustomError(
                "best_of",
                "best_of {best_of} is not n {n}; give n alone, all of its choices are answered",
                {"best_of": shown(self.best_of), "n": shown(self.n), "param": "best_of"},
            )
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "stream_options is for stream true; leave it out", {"param": "stream_options"}
            )
        if self.min_tokens > self.max_tokens:
            raise PydanticCustomError(
                "min_tokens",
                "min_tokens {least} is more than max_tokens {most}; lower it",
                {"least": shown(self.min_tokens), "most": shown(self.max_tokens), "param": "min_tokens"},
            )
        return self

    @property
    def lists_logprobs(self) -> bool:
        return self.logprobs is not None or self.logprob_token_ids is not None


class Logprobs(BaseModel):
    """One entry per token: of the prompt with `echo`, then of all that was generated, a stop string's included."""

    text_offset: list[int] = Field(
        description="Where in `text` each token begins: the character that its first byte is of."
    )
    tokens: list[str] = Field(
        description='Each token\'s text; its bytes as "bytes:\\xf0\\x9f" where they are no UTF-8 alone.'
    )
    token_logprobs: list[float | None] = Field(description="null for the first of a prompt.")
    top_logprobs: list[dict[str, float] | None] = Field(
        description="The token itself, then those asked for; of two with the same text the second is "
        '"token_id:17". No less than -9999.'
    )


class Choice(BaseModel):
    index: int = Field(description="prompt * n + choice.")
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None = Field(description="null in a chunk that is not a choice's last.")
    stop_reason: str | int | None = Field(description="The stop string, or the id of stop_token_ids, that ended it.")
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CachedTokens(BaseModel):
    cached_tokens: int = Field(description="Tokens of prompts that need not be computed again.")


class CompletionUsage(BaseModel):
    """Tokens of each prompt once, and of all its choices, with the tokens that ended them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class CompletionAnswer(BaseModel):
    """Also the shape of a chunk, whose `usage` is null or left out but for the last."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="Seconds since 1970.")
    model: str
    choices: list[Choice]
    usage: CompletionUsage | None = None
