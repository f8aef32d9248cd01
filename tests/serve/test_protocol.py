"""Bodies of calls, checked without a server."""

import pytest

from kimi_jax.serve.protocol import ApiError, chat_call


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "contents": "x"}, "messages[0].contents"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages[0].function_call"),
    ],
)
def test_message_field_without_a_meaning_is_a_400_that_names_it(message, param):
    with pytest.raises(ApiError) as caught:
        chat_call({"messages": [message]})
    assert (caught.value.status, caught.value.param) == (400, param)
