"""The package `openai` as a client; skipped where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.chats import talk
from support.laptop import Laptop
from support.serving import KEY, chat_model, serving

from llmpy.api import Model
from llmpy.data.encode import prompt_ids
from llmpy.generate.generation import encode_prompt
from llmpy.generate.sampling import Choice

openai = pytest.importorskip("openai")
Json = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(chat_model(tmp_path_factory.mktemp("model")), machine=Laptop())


@pytest.fixture(scope="module")
def client(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = chat_model(tmp_path_factory.mktemp("served"))
    with (
        serving(folder, name="m", api_key=KEY, texts=4) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=9) as client,
    ):
        yield client


def alone(model: Model, asked: str | list[Json], count: int, choice: Choice, seed: int, *stop: str) -> str:
    tokenizer = model.require_tokenizer()
    ids = encode_prompt(tokenizer, asked) if isinstance(asked, str) else prompt_ids("x", asked, tokenizer)
    return "".join(model.continued(ids, count, choice, stop, seed))


def test_models(client: Any) -> None:
    assert [found.id for found in client.models.list()] == ["m"]
    assert client.models.retrieve("m").owned_by == "llmpy"


def test_completions(client: Any, model: Model) -> None:
    whole = alone(model, "What is", 20, Choice(0.8), 4)
    asked = {"model": "m", "prompt": "What is", "max_tokens": 20, "temperature": 0.8, "seed": 4}
    found = client.completions.create(**asked, logprobs=2)
    assert found.choices[0].text == whole and found.usage.completion_tokens == 20
    assert len(found.choices[0].logprobs.token_logprobs) == 20
    stop = whole[6:8]
    stopped = client.completions.create(**asked, stop=[stop])
    assert stopped.choices[0].text == alone(model, "What is", 20, Choice(0.8), 4, stop)
    assert stopped.choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)) == whole
    penalized = client.completions.create(**asked, extra_body={"top_k": 7, "repetition_penalty": 1.2})
    assert penalized.choices[0].text == alone(model, "What is", 20, Choice(0.8, 7, 1, 0, 1.2), 4)


def test_chats_of_sixteen_clients(client: Any, model: Model) -> None:
    """A conversation each, whose answers the client sends back as it received them."""

    def converse(seed: int) -> list[str]:
        said, answers = talk(f"What is {seed} + 2?", system="Be brief."), []
        for question in ("And?", "Why?"):
            asked = {"model": "m", "messages": said, "max_completion_tokens": 9, "seed": seed + 1, "top_p": 0.9}
            if seed % 2:
                answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
                assert all(len(token.top_logprobs) == 2 for token in answer.choices[0].logprobs.content)
                message = answer.choices[0].message.model_dump()
            else:
                options = {"stream": True, "stream_options": {"include_usage": True}}
                *chunks, last = client.chat.completions.create(**asked, **options)
                assert last.usage.completion_tokens <= 9
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                message = {"role": "assistant", "content": text}
            assert message["content"] == alone(model, said, 9, Choice(1, 0, 0.9), seed + 1)
            answers.append(message["content"])
            said = [*said, message, *talk(question)]
        return answers

    with ThreadPoolExecutor(16) as pool:
        assert len([*pool.map(converse, range(16))]) == 16


def test_errors(client: Any) -> None:
    asked: Json = {"model": "m", "messages": talk("Hi"), "max_tokens": 2}
    for more, kind, code in (
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 9}, openai.BadRequestError, "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "unsupported_parameter"),
        ({"messages": talk("word " * 99)}, openai.BadRequestError, "context_length_exceeded"),
    ):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**asked | more)
        assert caught.value.code == code
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()


def test_a_stream_that_is_closed_frees_its_place(client: Any) -> None:
    for _ in range(12):  # three times as many as there are places
        long = {"model": "m", "prompt": "Hi", "max_tokens": 10**6, "temperature": 0, "stream": True}
        with client.completions.create(**long) as stream:
            assert next(iter(stream)).choices
    assert client.completions.create(model="m", prompt="Hi", max_tokens=2).choices
