import pytest
from conftest import character_tokenizer, write_rows
from tokenizers import normalizers

from agcl.data.chat import ChatTurns, split_chat
from agcl.data.datamodule import ContinualDataModule
from agcl.data.tasks import AnswerEncoder, Probe, Task
from agcl.errors import AgclError

TURNS = "{% for turn in messages %}"
ASKED = "{% if add_generation_prompt %}"
CHATML = (
    TURNS + "<s>{{ turn.role[0] }} {{ turn.content }}<eos> {% endfor %}" + ASKED + "<s>a {% endif %}"
)  # the end of a turn is the end of the sequence, and white space follows
OTHER_END = TURNS + "<s>{{ turn.role[0] }} {{ turn.content | trim }}<e> {% endfor %}" + ASKED + "<s>a {% endif %}"
NO_BEGINNING = TURNS + "<s>{{ turn.content }}{% if turn.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
SPACE = NO_BEGINNING.replace("<s>{{", "{% if turn.role == 'user' %}<s>{% else %} {% endif %}{{")
THINKING = (
    TURNS + "<s>{{ turn.role[0] }} {% if loop.last and turn.role == 'assistant' %}<t>{% endif %}{{ turn.content }}<eos>"
    "{% endfor %}" + ASKED + "<s>a {% if enable_thinking is defined and not enable_thinking %}<t>{% endif %}{% endif %}"
)
THINKING_IN_ANSWERS = THINKING.replace("{% if enable_thinking is defined and not enable_thinking %}<t>{% endif %}", "")
TASK = {"name": "t", "prompt": "{q}?", "answer": " {a}"}


def tokenizer(template):
    made = character_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<s>", "<e>", "<t>"]})
    made.chat_template = template
    return made


def encoded(tmp_path, template, system_prompt=None):
    known = tokenizer(template)
    path = write_rows(tmp_path / "a.jsonl", [{"q": "ab", "a": "c"}])
    task = Task(source=str(path), **TASK)
    encoder = AnswerEncoder(known, 64, chat=ChatTurns(known, system_prompt))
    (row,) = encoder.encode_rows(task, "train", task.prompt)
    ids = row["input_ids"]
    cut = row["labels"].count(-100)
    assert row["labels"][cut:] == ids[cut:]
    assert row["answer"] == "c"
    assert encoder.encode_answer(task.label_answer("c")) == ids[cut:]
    return known.decode(ids[:cut]), known.decode(ids[cut:])


@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        (CHATML, "<s>u ab?<eos> <s>a ", "c<eos>"),
        (OTHER_END, "<s>u ab?<e> <s>a ", "c<e>"),
        (OTHER_END.replace("<e>", "ee"), "<s>u ab?ee <s>a ", "c<eos>"),  # no token by which to end
        (NO_BEGINNING, "<s>ab?<s>", "c<eos>"),
        (SPACE, "<s>ab?", " c<eos>"),
        (THINKING, "<s>u ab?<eos><s>a <t>", "c<eos>"),
        (THINKING_IN_ANSWERS, "<s>u ab?<eos><s>a <t>", "c<eos>"),
    ],
)
def test_prompt_and_answer_become_turns_and_the_answer_is_closed_once(tmp_path, template, prompt, answer):
    assert encoded(tmp_path, template) == (prompt, answer)


CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": " d"},
]
WRITTEN = "<s>u a<eos> <s>a b<eos> <s>u c<eos> <s>a "


def encoded_chats(tmp_path, rows, system_prompt=None, **task):
    known = tokenizer(CHATML)
    task = Task("t", str(write_rows(tmp_path / "a.jsonl", rows)), messages="m", **task)
    chat = ChatTurns(known, system_prompt)
    encoder = AnswerEncoder(known, 64, chat=chat)
    decoded = []
    for row in encoder.encode_rows(task, "train", task.prompt):
        cut = row["labels"].count(-100)
        assert row["labels"][cut:] == row["input_ids"][cut:]
        decoded.append((known.decode(row["input_ids"][:cut]), known.decode(row["input_ids"][cut:]), row["answer"]))
    return decoded


def test_the_last_turn_of_a_chat_is_the_answer_and_those_before_it_the_prompt(tmp_path):
    system = {"role": "system", "content": "e"}
    named = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert encoded_chats(tmp_path, [{"m": CHAT, "a": 1}]) == [(WRITTEN, "d<eos>", "d")]
    assert encoded_chats(tmp_path, [{"m": [system, *CHAT]}, {"m": CHAT}], "f") == [
        ("<s>s e<eos> " + WRITTEN, "d<eos>", "d"),
        ("<s>s f<eos> " + WRITTEN, "d<eos>", "d"),
    ]
    assert encoded_chats(tmp_path, [{"m": named}]) == [("<s>u a<eos> <s>a ", "b<eos>", "b")]
    roles = [{"role": "human", "content": "a", "from": "here"}, {"role": "model", "content": "b", "from": "there"}]
    assert encoded_chats(tmp_path, [{"m": roles}]) == [("<s>u a<eos> <s>a ", "b<eos>", "b")]


def test_turns_may_differ_in_what_they_have_beside_role_and_content(tmp_path):
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    chat = [CHAT[0], called, {"role": "tool", "content": "e", "id": 1}, CHAT[3] | {"weight": 1}]
    ((prompt, answer, _),) = encoded_chats(tmp_path, [{"m": None}, {"m": chat}], drop_empty=True)
    assert prompt == "<s>u a<eos> <s>a <eos> <s>t e<eos> <s>a "  # this template does not write the call
    assert answer == "d<eos>"


def test_what_a_turn_does_not_have_is_not_shown_to_the_template():
    call = {"name": "f", "arguments": {"x": 1, "y": None}}
    turns = [{"role": "user", "content": "a", "tool_calls": None}, CHAT[1] | {"tool_calls": [call]}, CHAT[2], CHAT[3]]
    before, answer = split_chat(turns)
    assert before[0] == {"role": "user", "content": "a"}
    assert before[1]["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]
    assert answer == " d"


def test_a_row_that_its_template_refuses_is_named(tmp_path):
    known = tokenizer(CHATML + "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}")
    task = Task("t", str(write_rows(tmp_path / "a.jsonl", [{"m": CHAT[:2]}, {"m": CHAT}])), messages="m")
    encoder = AnswerEncoder(known, 64, chat=ChatTurns(known))
    with pytest.raises(AgclError, match=r"Task `t`: row 1 of `train`: The model's chat template refuses.*: too long"):
        encoder.encode_rows(task, "train", task.prompt)


def test_chats_whose_answers_are_labels(tmp_path):
    known = tokenizer(CHATML)
    task = Task(
        "t",
        str(write_rows(tmp_path / "a.jsonl", [{"m": CHAT}])),
        messages="m",
        metric="label_accuracy",
        labels=["e", "d"],
    )
    (row,) = AnswerEncoder(known, 64, chat=ChatTurns(known)).encode_rows(task, "train", task.prompt)
    assert row["label"] == 1
    with pytest.raises(AgclError, match=r"has the label 'd', which is not among `labels` \(e\)"):
        encoded_chats(tmp_path, [{"m": CHAT}], metric="label_accuracy", labels=["e"])
    assert Task("t", "a.jsonl", messages="m").label_answer("e") == "e"


@pytest.mark.parametrize(
    "chat",
    [
        *([], None, CHAT[:3], CHAT[1:2], [{"role": "system", "content": "e"}, CHAT[1]]),
        [*CHAT[:3], {"role": "assistant", "content": None}],
        [*CHAT[:3], CHAT[3] | {"tool_calls": [{"name": "f"}]}],
    ],
)
def test_a_chat_without_an_answer_is_refused_or_left_out(tmp_path, chat):
    rows = [{"m": CHAT}, {"m": chat}]
    with pytest.raises(AgclError, match=r"Task `t`.* row 1 of `train`"):
        encoded_chats(tmp_path, rows)
    assert len(encoded_chats(tmp_path, rows, drop_empty=True)) == 1


@pytest.mark.parametrize(
    "chats", ["text", [{"role": "user", "content": [{"type": "text"}]}], [{"name": "user"}], ["text"]]
)
def test_a_column_without_chats_is_refused(tmp_path, chats):
    with pytest.raises(AgclError, match=r"column `m` of .* holds no chats, which are lists of turns"):
        encoded_chats(tmp_path, [{"m": chats}])


def test_the_answers_tokens_are_those_it_has_in_the_chat(tmp_path):
    known = tokenizer(CHATML)
    known.backend_tokenizer.normalizer = normalizers.Prepend(" ")  # to every text, as SentencePiece does
    chat = ChatTurns(known)
    assert known.decode(chat.encode_answer(" c")) == "c<eos>"
    assert known.decode(known("c")["input_ids"]) == " c"


def test_a_token_that_is_not_special_would_stay_in_the_answer_and_does_not_end_it():
    known = tokenizer(OTHER_END)
    assert ChatTurns(known).end_token_id == known.convert_tokens_to_ids("<e>")
    plain = character_tokenizer()
    plain.add_tokens(["<s>", "<e>"])
    plain.chat_template = OTHER_END
    assert ChatTurns(plain).end_token_id == plain.eos_token_id


def test_too_long_a_chat_is_not_advised_to_be_cut(tmp_path):
    known = tokenizer(CHATML)
    task = Task(source=str(write_rows(tmp_path / "a.jsonl", [{"q": "ab" * 9, "a": "c"}])), **TASK)
    with pytest.raises(AgclError, match=r"shorten it, or raise `max_length` if the model's context allows\.$"):
        AnswerEncoder(known, 16, chat=ChatTurns(known)).encode_rows(task, "train", task.prompt)


def test_system_prompt_comes_first(tmp_path):
    assert encoded(tmp_path, CHATML, "be kind") == ("<s>s be kind<eos> <s>u ab?<eos> <s>a ", "c<eos>")


@pytest.mark.parametrize(
    ("template", "system_prompt", "message"),
    [
        (None, None, "has none: take a model that was trained to chat, or leave it out"),
        (CHATML.replace("<s>a ", "<t>"), None, "writes an answered question otherwise"),
        ("{{ messages[0].content }}", None, "writes an answered question otherwise"),
        (CHATML + "{{ raise_exception('no\nsystem turn') }}", "be kind", "refuses the turns: no system turn"),
    ],
)
def test_templates_of_no_use_are_refused(template, system_prompt, message):
    with pytest.raises(AgclError, match=message):
        ChatTurns(tokenizer(template), system_prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template": True, "truncation": "left"}, "would cut the beginning of the chat"),
        ({"system_prompt": "be kind"}, "set `chat_template: true`"),
        ({"chat_template": True, "metric": "sari"}, "`sari` compares with the prompt alone"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    metric = options.pop("metric", "exact_match")
    with pytest.raises(AgclError, match=message):
        ContinualDataModule([Task(source="a.jsonl", metric=metric, **TASK)], **options)


def test_chats_need_a_template_and_no_other_prompt_or_answer():
    with pytest.raises(AgclError, match="its `messages` are chats, so set `chat_template: true`"):
        ContinualDataModule([Task("t", "a.jsonl", messages="m")])
    for options in ({"prompt": "{q}"}, {"answer": "{a}"}, {"probes": {"p": Probe(prompt="{q}")}}):
        with pytest.raises(AgclError, match="`messages` holds prompt and answer already"):
            Task("t", "a.jsonl", messages="m", **options)
