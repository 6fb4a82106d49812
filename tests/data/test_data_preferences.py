"""`load_preferences` as a whole: columns, behaviours, weights, splits and the account of rows."""

import json
import os
import random
import subprocess
import sys

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foretune.data import load_preferences, tables
from foretune.errors import UserError

COLUMNS = ["pair_id", "prompt", "chosen", "rejected", "behaviour", "weight"]
CALL = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}
DROPPED = ("empty", "identical", "malformed", "leaked", "surplus")


def make_rows(num_rows=20, **extra):
    return [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} | extra for n in range(num_rows)]


def load(write_rows, rows, **options):
    return load_preferences(str(write_rows(rows)), **options)


def assert_rows_add_up(info):
    for row in info.counts:
        assert row["read"] == row["kept"] + sum(row[name] for name in DROPPED), row


def test_columns_types_and_order(write_rows):
    data = load(write_rows, make_rows(topic="art"))
    for table in (data.train, data.test):
        assert table.column_names == COLUMNS
        assert [table.features[name].dtype for name in ("pair_id", "weight", "prompt")] == [
            "int64",
            "float64",
            "string",
        ]
    order = [int(prompt[1:]) for prompt in data.train["prompt"]]
    assert order == sorted(order)
    assert not set(data.train["prompt"]) & set(data.test["prompt"])
    json.dumps(data.info.as_dict())


def test_split_and_ids_do_not_depend_on_row_order(write_rows):
    rows = make_rows(topic="art") + make_rows(12, topic="maths")
    first = load(write_rows, rows, max_pairs_per_behaviour=5)
    second = load(write_rows, random.Random(0).sample(rows, len(rows)), max_pairs_per_behaviour=5)
    for split in ("train", "test"):
        by_id = [{row["pair_id"]: row for row in getattr(data, split).to_list()} for data in (first, second)]
        assert by_id[0] == by_id[1]


def test_every_kind_of_dropped_row_is_counted(write_rows):
    rows = make_rows(8, topic="art") + [
        {"prompt": "p", "chosen": "same", "rejected": "same", "topic": "art"},
        {"prompt": "p", "chosen": "c", "rejected": None, "topic": "art"},
        {"prompt": "p", "chosen": "c", "rejected": 3, "topic": "maths"},
        *make_rows(1, topic="art"),
    ]
    info = load(write_rows, rows, test_fraction=0).info
    assert_rows_add_up(info)
    art, maths = info.counts
    assert (art["read"], art["kept"], art["identical"], art["empty"], art["duplicates"]) == (11, 9, 1, 1, 1)
    assert (maths["read"], maths["kept"], maths["malformed"]) == (1, 0, 1)
    assert info.behaviours == ["art"]
    assert "Rows dropped: 1 empty, 1 identical, 1 malformed." in info.notes
    assert any("row 11 of pairs.jsonl: rejected is int, neither text" in note for note in info.notes)


def test_nothing_left(write_rows):
    rows = [{"prompt": "", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "a"}]
    with pytest.raises(UserError, match="no training rows are left of 2 rows read: 1 empty, 1 identical"):
        load(write_rows, rows)


def test_leaked_rows_are_dropped_from_a_given_test_split(tmp_path, write_rows):
    write_rows(make_rows(10), "train.jsonl")
    write_rows([*make_rows(3), {"prompt": "new", "chosen": "a", "rejected": "b"}], "test.jsonl")
    data = load_preferences(str(tmp_path))
    assert data.test["prompt"][:] == ["new"]
    assert_rows_add_up(data.info)
    assert data.info.counts[1]["leaked"] == 3


def test_a_shared_prompt_is_on_one_side_only(write_rows):
    data = load(write_rows, make_rows(topic="art") + make_rows(topic="maths"))
    assert not set(data.train["prompt"]) & set(data.test["prompt"])
    assert [row["kept"] for row in data.info.counts] == [16, 4, 16, 4]
    assert_rows_add_up(data.info)


def test_limits(write_rows):
    data = load(write_rows, make_rows(topic="art") + make_rows(4, topic="maths"), max_pairs_per_behaviour=10)
    assert_rows_add_up(data.info)
    assert [row["kept"] for row in data.info.counts] == [10, 2, 3, 1]
    assert [row["surplus"] for row in data.info.counts] == [6, 2, 0, 0]


def test_behaviour_columns(write_rows):
    rows = [
        row | {"lang": lang, "n": n}
        for n, (row, lang) in enumerate(zip(make_rows(4), ["de", None, "", 3], strict=True))
    ]
    info = load(write_rows, rows, test_fraction=0).info
    assert info.behaviours == ["everything"]
    assert info.behaviour_column is None
    assert info.notes[0] == (
        "No behaviour column found among prompt, chosen, rejected, lang, n: everything is one behaviour, called "
        "'everything'. Pass --behaviour_column to name one."
    )
    assert load(write_rows, rows, behaviour_column="lang").info.behaviours == ["(none)", "3", "de"]
    assert load(write_rows, rows, behaviour_column="file").info.behaviours == ["pairs"]
    message = "no behaviour column 'topc': found prompt, chosen, rejected, lang, n; pass one of them with --behaviour"
    with pytest.raises(UserError, match=message):
        load(write_rows, rows, behaviour_column="topc")


def test_columns_that_only_look_like_behaviours_are_passed_over(write_rows):
    rows = [row | {"source": f"http://{n}", "category": [1]} for n, row in enumerate(make_rows(30))]
    info = load(write_rows, rows).info
    assert info.behaviours == ["everything"]
    assert "Column 'source' was not taken for the behaviour: it has 30 different values in 30 rows." in info.notes
    with pytest.raises(UserError, match="behaviour column 'category' does not hold names"):
        load(write_rows, rows, behaviour_column="category")


def test_wanted_behaviours(write_rows):
    rows = make_rows(topic="arts") + make_rows(topic="maths")
    info = load(write_rows, rows, behaviours=["arts"]).info
    assert info.behaviours == ["arts"]
    assert {row["behaviour"] for row in info.counts} == {"arts"}
    with pytest.raises(UserError, match="no behaviour 'art' in the data; the nearest names are arts"):
        load(write_rows, rows, behaviours=["art"])


def test_weights(write_rows):
    rows = [row | {"weight": weight} for row, weight in zip(make_rows(3), [2, None, 0.5], strict=True)]
    data = load(write_rows, rows, test_fraction=0)
    assert data.train["weight"][:] == [2.0, 1.0, 0.5]
    assert "1 rows have no value in column 'weight' and weigh 1." in data.info.notes
    assert set(load(write_rows, make_rows()).train["weight"]) == {1.0}
    with pytest.raises(UserError, match="weight column 'weight' holds -1 in row 1 of pairs.jsonl"):
        load(write_rows, make_rows(weight=-1))
    with pytest.raises(UserError, match="weights of all training rows are 0"):
        load(write_rows, make_rows(weight=0))
    with pytest.raises(UserError, match="no weight column 'wt': found prompt, chosen, rejected"):
        load(write_rows, make_rows(), weight_column="wt")


def test_conversations_tools_and_template_arguments(write_rows):
    tools = [{"name": "f", "parameters": {"x": "int"}}, {"name": "g"}]
    rows = [
        {
            "chosen": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "bad"}],
        }
        for n in range(5)
    ]
    rows[0] |= {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    data = load(write_rows, rows, test_fraction=0)
    row = data.train[0]
    assert row["prompt"] == [{"role": "user", "content": "q0"}]
    assert row["chosen"] == [{"role": "assistant", "content": "good"}]
    assert json.loads(row["tools"]) == tools
    assert row["chat_template_kwargs"] == {"enable_thinking": False}
    assert data.train[1]["tools"] is None
    assert data.info.format == "implicit prompt"


def test_conversations_have_the_same_ids_from_any_kind_of_file(write_rows, tmp_path):
    question = [{"role": "user", "content": "q"}]
    rows = [
        {"prompt": question, "chosen": [{"role": "assistant", "content": "a"}], "rejected": [CALL]},
        {"prompt": question, "chosen": [{"role": "assistant", "content": "b", "name": None}], "rejected": [CALL]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "pairs.parquet"))
    tables = [
        load_preferences(path, test_fraction=0).train.to_list()
        for path in (str(write_rows(rows)), str(tmp_path / "pairs.parquet"))
    ]
    assert tables[0] == tables[1]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc")), min_size=1, max_size=30), st.floats(0, 0.9))
def test_no_prompt_is_ever_on_both_sides(write_rows, drawn, fraction):
    rows = [{"prompt": f"p{n}", "chosen": "c", "rejected": "r", "topic": topic} for n, topic in drawn]
    data = load(write_rows, rows, test_fraction=fraction)
    test_prompts = set(data.test["prompt"]) if data.test else set()
    assert not test_prompts & set(data.train["prompt"])
    assert len(data.train) + (len(data.test) if data.test else 0) == len(rows)
    assert_rows_add_up(data.info)


def test_text_beside_conversations(write_rows):
    talk = {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}]}
    talk["rejected"] = [{"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match="1 rows are conversations and 20 are text; load them as two data sets"):
        load(write_rows, [*make_rows(), talk])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_fraction": float("nan")}, "--test_fraction is nan"),
        ({"test_fraction": 1.0}, "--test_fraction is 1.0; it must be at least 0 and less than 1"),
        ({"max_pairs_per_behaviour": 0}, "--max_pairs_per_behaviour is 0; it must be at least 1"),
        ({"test_split": "train"}, "the train and test splits are both 'train'"),
    ],
)
def test_options(write_rows, options, message):
    with pytest.raises(UserError, match=message):
        load(write_rows, make_rows(), **options)


def test_import_is_light():
    code = (
        "import sys, foretune.data; print({'torch', 'trl', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert told.stdout.strip() == "set()"


def test_messages_whose_keys_differ_from_block_to_block_share_one_table(write_rows, monkeypatch):
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 4)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"q{index}", **({"name": "me"} if index == 7 else {})}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
            "tools": [{"name": "t"}] if index > 5 else None,
        }
        for index in range(10)
    ]
    found = load_preferences(str(write_rows(rows)), test_fraction=0.0).train
    assert found["tools"][:] == [None] * 6 + ['[{"name": "t"}]'] * 4
    assert [message[0].get("name") for message in found["prompt"][:]] == [None] * 7 + ["me"] + [None] * 2
    assert found.cache_files and found.column_names[:3] == ["pair_id", "prompt", "chosen"]


def test_types_that_differ_from_block_to_block_are_told(write_rows, monkeypatch):
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 4)
    answers = {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}
    rows = [
        {"prompt": [{"role": "user", "content": f"q{index}", "mark": "x" if index < 5 else [1]}], **answers}
        for index in range(8)
    ]
    with pytest.raises(UserError, match="the rows do not fit one table: .*give each key of messages one type"):
        load_preferences(str(write_rows(rows)))


def chats(num_rows=12, **extra):
    fields = ("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")
    return [
        {name: [{"role": role, "content": f"{name} {n}"}] for name, role in fields} | {"topic": "art"} | extra
        for n in range(num_rows)
    ]


@pytest.mark.parametrize(
    "extra, reason",
    [
        ({"tools": 3}, "tools is int, neither a list nor one as JSON"),
        ({"tools": "not json"}, "tools is text that is no JSON list"),
        ({"tools": '{"name": "f"}'}, "tools is text that is no JSON list"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs is str, not an object"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs sets tokenize, which encoding sets"),
        ({"prompt": [{"role": "\ud800", "content": "x"}]}, "a message of prompt has half of a surrogate pair"),
    ],
)
def test_conversations_that_no_template_takes_are_malformed(write_rows, extra, reason):
    data = load(write_rows, chats() + [row | extra for row in chats(1)])
    assert "Rows dropped: 1 malformed." in data.info.notes
    with pytest.raises(UserError, match=f"the first malformed one is row 1 of pairs.jsonl: .*{reason}"):
        load(write_rows, chats(**extra))


@pytest.mark.parametrize("extra", [{"tools": [{"name": "f"}]}, {"tools": "[]"}, {"chat_template_kwargs": {"a": 1}}])
def test_conversations_keep_what_templates_take(write_rows, extra):
    assert next(iter(extra)) in load(write_rows, chats(**extra)).train.column_names


def test_of_text_no_template_is_asked(write_rows):
    assert load(write_rows, make_rows(topic="art", tools=3, chat_template_kwargs="x")).info.counts[0]["malformed"] == 0


def test_half_a_surrogate_pair_in_a_name_drops_the_row(write_rows):
    info = load(write_rows, make_rows(topic="art") + make_rows(2, topic="\ud800x")).info
    assert {row["behaviour"]: row["malformed"] for row in info.counts if row["malformed"]} == {"?x": 2}
    json.dumps(info.as_dict(), ensure_ascii=False).encode()
    with pytest.raises(UserError, match="its behaviour's name holds half of a surrogate pair"):
        load(write_rows, make_rows(topic="\ud800"))


def test_a_margin_beyond_all_floats_is_none(write_rows):
    rows = make_rows(topic="art", margin=1.5) + make_rows(20, topic="maths", margin=10**400)
    margins = load(write_rows, [row | {"prompt": f"{n}"} for n, row in enumerate(rows)]).train["margin"]
    assert set(margins) == {1.5, None}
