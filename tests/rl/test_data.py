"""Data files: both formats load, bad lines are named."""

from __future__ import annotations

import json
import re

import pytest

from megatron_pr2.errors import DataError
from megatron_pr2.rl.data import Example, load_examples
from megatron_pr2.rl.rewards import exact_match, extract_number

# Lines as GSM8K has them: steps in <<>>, unescaped text with U+2019, grouped and negative gold numbers.
GSM8K = [
    {
        "question": "Janet\u2019s ducks lay 16 eggs. She eats 3. How many are left?",
        "answer": "16-3=<<16-3=13>>13\n#### 13",
    },
    {"question": "A house is worth $1,450,000. And now?", "answer": "It is 1,450,000 still.\n#### 1,450,000"},
    {"question": "It falls by 10 from 0.", "answer": "0-10=<<0-10=-10>>-10\n#### -10"},
]


def write(path, *lines: object):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8"
    )
    return path


def test_own_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "8+7=", "answer": "15"}, "", {"prompt": "1+1=", "answer": 2, "id": 7})
    assert load_examples(path) == [Example("8+7=", "15", f"{path}:1"), Example("1+1=", "2", f"{path}:3")]


def test_gsm8k_lines(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in GSM8K), encoding="utf-8")
    examples = load_examples(path)
    assert [e.answer for e in examples] == ["13", "1,450,000", "-10"]
    assert examples[0].prompt == GSM8K[0]["question"]
    assert [extract_number(e.answer) for e in examples] == [13, 1450000, -10]
    assert all(exact_match(row["answer"], e.answer) == 1.0 for row, e in zip(GSM8K, examples, strict=True))


def test_line_separators_inside_a_text_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a\u2028b\x85c", "answer": "1"}\r\n'.encode())
    assert load_examples(path) == [Example("a\u2028b\x85c", "1", f"{path}:1")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "8+7="}, "no field 'answer'"),
        ({"answer": "8"}, "no field 'prompt'"),
        ({"question": "8+7?"}, "no field 'answer'"),
        ({"question": "8+7?", "answer": "fifteen"}, "without '####'"),
        ({"question": "8+7?", "answer": "15 #### "}, "nothing behind '####'"),
        ({"prompt": "8+7=", "answer": ""}, "field 'answer' is ''"),
        ({"prompt": "8+7=", "answer": None}, "field 'answer' is None"),
        ({"prompt": "8+7=", "answer": True}, "field 'answer' is True"),
        ({"prompt": "  ", "answer": "15"}, "field 'prompt' is '  '"),
        ({"prompt": 15, "answer": "15"}, "field 'prompt' is 15"),
        ('{"prompt": "8+7=", "answer": ', "not JSON"),
        ("[1, 2]", "a JSON list"),
        ('"text"', "a JSON str"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = write(tmp_path / "bad.jsonl", {"prompt": "1+1=", "answer": "2"}, line)
    with pytest.raises(DataError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(words)):
        load_examples(path)


def test_a_bad_file_is_named(tmp_path):
    for name, content, words in [("empty", b"", "no examples"), ("blank", b"\n \n", "no examples")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: {words}"):
            load_examples(tmp_path / name)
    (tmp_path / "latin1").write_bytes(b'{"prompt": "a", "answer": "1"}\n{"prompt": "\xe9", "answer": "1"}\n')
    with pytest.raises(DataError, match=r"latin1:2: not UTF-8"):
        load_examples(tmp_path / "latin1")
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read"):
        load_examples(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        load_examples(tmp_path)
