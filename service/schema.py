"""The shapes of requests and answers, as the OpenAPI document shows them. B prompts, V the vocabulary."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import CoreSchema

from service.errors import nearest, shown

T = TypeVar("T")
MAX_TOKENS_ASKED = 256  # each costs one pass over the V logits of every result

# What the document says of values that functions check here: they say more, and say it better.
Text = Annotated[str, Field(min_length=1)]
Id = Annotated[int, Field(ge=0)]
Several = Annotated[list[T], Field(min_length=1)]
MostTokens = Annotated[list[Text | Id], Field(max_length=MAX_TOKENS_ASKED)]


def _text(value: str) -> str:
    """`value`, where a tokenizer can take it and it is not empty."""
    if not value:
        raise PydanticCustomError("empty", "is empty; give at least one character")
    return _any_text(value)


def _any_text(value: str) -> str:
    """`value`, where a tokenizer can take it."""
    if "\0" in value:
        raise PydanticCustomError("nul", "holds U+0000, which is no text; remove it")
    return without_surrogates(value)


def without_surrogates(value: str) -> str:
    """`value`, where UTF-8 can carry it."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise PydanticCustomError(
                "surrogate",
                "holds the lone surrogate {code} at character {at}, which is no text; remove it",
                {"code": f"U+{ord(value[error.start]):04X}", "at": error.start},
            ) from None
    return value


def _prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several, as text or token ids -> a list of prompts, none of them empty."""
    if isinstance(value, str):
        return [_text(value)]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return [_text(item) for item in value]
        if all(isinstance(item, list) and all(type(i) is int for i in item) for item in value):
            if not all(value):
                raise PydanticCustomError("empty", "holds an empty list of token ids; give at least one id")
            return list(value)
    raise PydanticCustomError(
        "prompt",
        "must be a text, a list of texts, a list of whole token ids, or a list of such lists; not empty",
    )


def _models(value: Any) -> list[str]:
    """One name, several different ones, or "*" -> a list of names."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise PydanticCustomError("model", 'must be a name, a list of names, or "*" for all')
    twice = next((name for name, times in Counter(names).items() if times > 1), None)
    if twice is not None:
        raise PydanticCustomError("model", "names {name} twice; name each once", {"name": shown(twice)})
    return names


def _tokens(value: Any) -> list[str | int]:
    if not isinstance(value, list) or not all(type(item) in (str, int) for item in value):
        raise PydanticCustomError("tokens", "must be a list of token ids and texts of one token each")
    if len(value) > MAX_TOKENS_ASKED:
        raise PydanticCustomError("tokens", "may hold at most {most} tokens", {"most": MAX_TOKENS_ASKED})
    return [_text(item) if isinstance(item, str) else item for item in value]


def _query(value: Any) -> str | list[int]:
    if isinstance(value, str):
        return _any_text(value)
    if isinstance(value, list) and all(type(item) is int for item in value):
        return value
    raise PydanticCustomError("query", "must be a text or a list of whole token ids")


def _items(value: Any) -> list[str | list[int]]:
    """One text or several, or several lists of token ids -> a list; any of them may be empty."""
    if isinstance(value, str):
        return [_any_text(value)]
    if isinstance(value, list):
        if all(isinstance(item, str) for item in value):
            return [_any_text(item) for item in value]
        if all(isinstance(item, list) and all(type(i) is int for i in item) for item in value):
            return list(value)
    raise PydanticCustomError("items", "must be a text, a list of texts, or a list of lists of whole token ids")


def _or_null(field: JsonSchemaValue) -> JsonSchemaValue:
    """The schema of what `field` is the schema of, and of null."""
    about: JsonSchemaValue = {key: field[key] for key in ("title", "description", "default") if key in field}
    kinds = field.get("anyOf") or [{key: value for key, value in field.items() if key not in about}]
    return {"anyOf": kinds if {"type": "null"} in kinds else [*kinds, {"type": "null"}], **about}


Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts, json_schema_input_type=Text | Several[Text] | Several[Id] | Several[Several[Id]]),
]


class Request(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The document says that a field which may be left out may be null."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        for name, field in schema["properties"].items():
            if name not in schema.get("required", ()):
                schema["properties"][name] = _or_null(field)
        return reference

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, data: Any) -> Any:
        """A null means that the field is not given; a field that we do not know is refused."""
        if not isinstance(data, dict):
            return data
        for field in data:
            if field not in cls.model_fields:
                known, hint = ", ".join(cls.model_fields), nearest(field, cls.model_fields)
                raise PydanticCustomError(
                    "unknown_field",
                    "unknown field {field}; known: {known}{hint}",
                    {"field": shown(field), "known": known, "hint": hint},
                )
        return {field: value for field, value in data.items() if value is not None}


class NextTokenRequest(Request):
    """The next token of each prompt, under each variant."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": ["gelu", "swiglu"], "prompt": "if x is not", "top_k": 3, "tokens": [" None"]},
            ]
        }
    )

    model: Annotated[list[str], PlainValidator(_models, json_schema_input_type=str | Several[str])] = Field(
        description='A variant\'s name, several, or "*" for all of them.'
    )
    prompt: Prompts = Field(description="One prompt or several, as text or as token ids.")
    top_k: int = Field(10, ge=0, description="How many of the likeliest tokens, up to all.")
    tokens: Annotated[list[str | int], PlainValidator(_tokens, json_schema_input_type=MostTokens)] = Field(
        default=[], description="Tokens to report besides: an id, or a text that is exactly one token."
    )


class Entry(BaseModel):
    """One token of the vocabulary after the prompt."""

    rank: int = Field(description="From 1, by falling logit, ties by rising id.")
    id: int
    text: str = Field(description="The token alone, decoded.")
    bytes: list[int] | None = Field(None, description="Its bytes, where they are no UTF-8 alone.")
    logit: float
    softmax: float = Field(description="exp(logit) / sum over V of exp(logit)")
    sigmoid: float = Field(description="1 / (1 + exp(-logit))")


class Spread(BaseModel):
    mass: float = Field(description="Sum of the probabilities over the vocabulary.")
    entropy_bits: float = Field(description="Of the probabilities divided by their mass.")


class Timing(BaseModel):
    """Milliseconds. Prompts that were computed together have the same `infer`."""

    tokenize: float
    queue: float
    infer: float
    total: float = Field(description="From the request's arrival to this result.")


class Result(BaseModel):
    """One prompt under one variant."""

    prompt_index: int
    model: str
    activation: str
    head: Literal["softmax", "sigmoid"] = Field(description="What the variant was trained with.")
    precision: str
    provider: str
    prompt_tokens: int
    softmax: Spread
    sigmoid: Spread
    top: list[Entry]
    chosen: list[Entry]
    timing_ms: Timing


class Usage(BaseModel):
    """Tokens that were computed: of every prompt, under every variant."""

    prompt_tokens: int
    total_tokens: int


class NextTokenAnswer(BaseModel):
    """Results with the prompts outermost: prompt 0 under each variant, prompt 1 under each, ..."""

    object: Literal["next_token"] = "next_token"
    id: str
    created: int = Field(description="Seconds since 1970.")
    results: list[Result]
    usage: Usage


class ScoreRequest(Request):
    """How likely each label is as the next token after query + item, for each item."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "gelu",
                    "query": "if x is",
                    "items": [" not", " None"],
                    "label_token_ids": [17, 42],
                    "apply_softmax": True,
                }
            ]
        }
    )

    model: str = Field(description="A variant's name.")
    query: Annotated[str | list[int], PlainValidator(_query, json_schema_input_type=str | list[Id])] = Field(
        description="Text or token ids; may be empty where no item is."
    )
    items: Annotated[
        list[str | list[int]], PlainValidator(_items, json_schema_input_type=str | list[str] | list[list[Id]])
    ] = Field(description="Texts with a query of text, lists of ids with one of ids.")
    label_token_ids: list[int] = Field(min_length=1, description="The tokens to score, by id.")
    apply_softmax: bool = Field(False, description="Over the labels alone, which then sum to 1; else over V.")
    item_first: bool = Field(False, description="item + query instead.")

    @model_validator(mode="after")
    def _of_one_kind(self) -> ScoreRequest:
        if any(isinstance(item, str) != isinstance(self.query, str) for item in self.items):
            raise PydanticCustomError("kinds", "query and items must both be text, or both token ids")
        return self


class ScoreAnswer(BaseModel):
    object: Literal["scoring"] = "scoring"
    model: str
    scores: list[list[float]] = Field(description="One list per item, one probability per label, in their order.")
    usage: Usage


class OutcomeRequest(Request):
    """The token that really came after a prompt of an experiment's answer."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"id": "1f0c2a9b00112233445566aa", "token": " None"}]})

    id: str = Field(max_length=64, description="The answer's x-exposure-id.")
    token: Annotated[str | int, PlainValidator(lambda value: _tokens([value])[0], json_schema_input_type=Text | Id)] = (
        Field(description="Its id, or its text, which must be exactly one token.")
    )
    prompt_index: int = Field(0, ge=0, description="Of an answer to several prompts.")


class TokenizeRequest(Request):
    """One text to token ids."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "if x is not", "add_special_tokens": False}]})

    model: str = Field("*", description="Whose tokenizer; may be left out where all variants share one.")
    prompt: Annotated[str, AfterValidator(_any_text)] = Field(description="The text; may be empty.")
    add_special_tokens: bool = Field(True, description="With what the tokenizer puts around a prompt.")
    return_token_strs: bool = Field(False, description="Also each token as the vocabulary spells it.")


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int = Field(description="Tokens that a prompt may have; the fewest, where no model was named.")
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Request):
    """Token ids to one text."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [0, 17]}]})

    model: str = Field("*", description="Whose tokenizer; may be left out where all variants share one.")
    tokens: list[int] = Field(description="May be empty.")


class DetokenizeAnswer(BaseModel):
    prompt: str = Field(description="Special tokens included.")
    bytes: list[int] | None = Field(None, description="Its bytes, where they are no UTF-8.")


class TokenizerInfo(BaseModel):
    """The part of transformers' tokenizer_config.json that can be known; null where there is none."""

    tokenizer_class: Literal["PreTrainedTokenizerFast"] = "PreTrainedTokenizerFast"
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: None = None
    model_max_length: int = Field(description="As max_model_len of /tokenize.")
    vocab_size: int
    models: list[str] = Field(description="The variants that have this tokenizer, of those asked for.")


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "unknown variant 'swigul'; known: gelu, swiglu; did you mean 'swiglu'?",
                        "type": "model_not_found",
                        "param": "model",
                        "code": 404,
                    }
                }
            ]
        }
    )

    error: ErrorBody
