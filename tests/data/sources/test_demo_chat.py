"""The demo's conversations: the data of the pre-training sources in the released template."""

import numpy as np

from kimi_jax.data.conversation import apply_chat_template
from kimi_jax.data.example import Image, Text
from kimi_jax.data.sources import demo
from kimi_jax.data.sources.demo_image import vqa_records


def learned(example) -> list[str]:
    return [p.text for p in example.parts if isinstance(p, Text) and p.loss_weight and not p.special]


def test_vqa_conversations_ask_what_the_data_set_asks():
    source = demo.open_demo("chat_vqa", "validation")
    for i in range(0, len(source), len(source) // 20):
        example = source[i]
        image, text = example.parts[3], "".join(p.text for p in example.parts if isinstance(p, Text))
        assert isinstance(image, Image) and np.asarray(image.image).shape == (64, 64, 3)
        record = next(r for r in vqa_records("validation") if f"/{r.image}/" in example.key)
        known = dict(record.questions)
        asked = [q for q in known if f"{q} Answer in one word.<|im_end|>" in text]
        assert sorted(learned(example)) == sorted(known[q] for q in asked) and 2 <= len(asked) <= 3


def test_sums_are_right_and_the_template_is_the_released_one():
    source = demo.open_demo("chat_sums", "train")
    example = source[5]
    text = "".join(p.text for p in example.parts)
    assert text.startswith("<|im_user|>user<|im_middle|>") and text.endswith("<|im_end|>")
    questions = [piece.split(" = ?")[0] for piece in text.split("<|im_middle|>")[1::2]]
    answers = learned(example)
    assert [str(eval(q, {"__builtins__": {}})) for q in questions] == answers and len(answers) == 4
    messages = [m for q, a in zip(questions, answers, strict=True) for m in (
        {"role": "user", "content": f"{q} = ? Answer in one word."}, {"role": "assistant", "content": a},
    )]  # fmt: skip
    assert text == apply_chat_template(messages, thinking=False)
