from actors.render import Renderer
from environments.base import Message
from penstock.quickstart.policy import character_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = Message(role="user", content="ab")


def tokenizer(template: str | None):  # type: ignore[no-untyped-def]
    made = character_tokenizer("abcdefghijklmnopqrstuvwxyz<>?")
    made.chat_template = template
    return made


def test_without_a_template_messages_are_concatenated():
    renderer = Renderer(tokenizer(None))
    assert renderer.text(renderer.first([USER, Message(role="user", content="cd")])) == "abcd"


def test_a_template_renders_the_prompt():
    made = tokenizer(TEMPLATE)
    ids = Renderer(made).first([USER])
    assert made.decode(ids) == "<user>ab" + made.eos_token + "<assistant>"


def test_what_follows_a_turn_is_what_the_template_adds():
    made = tokenizer(TEMPLATE)
    renderer = Renderer(made)
    sampled = [*made("cd", add_special_tokens=False)["input_ids"], made.eos_token_id]
    whole = [*renderer.first([USER]), *sampled, *renderer.following([USER], stopped=True)]
    conversation = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "cd"},
        {"role": "user", "content": "ab"},
    ]
    rendered = made.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert made.decode(whole) == rendered


def test_a_turn_cut_at_a_limit_gets_its_end_token_from_the_template():
    made = tokenizer(TEMPLATE)
    following = Renderer(made).following([USER], stopped=False)
    assert following[0] == made.eos_token_id


def test_special_tokens_are_no_part_of_the_text():
    made = tokenizer(None)
    assert (
        Renderer(made).text([*made("ab", add_special_tokens=False)["input_ids"], made.eos_token_id]) == "ab"
    )


def test_a_prompt_that_siblings_share_is_rendered_once():
    class Counting:
        eos_token_id = 1
        chat_template = None
        num_calls = 0

        def __call__(self, text, *, add_special_tokens):  # type: ignore[no-untyped-def]
            self.num_calls += 1
            return {"input_ids": [ord(character) for character in text]}

    made = Counting()
    renderer = Renderer(made)  # type: ignore[arg-type]
    other = Message(role="user", content="c")
    prompts = [renderer.first(messages) for messages in ([USER], [USER], (USER,), [other])]
    assert [prompt.tolist() for prompt in prompts] == [[97, 98]] * 3 + [[99]]
    assert made.num_calls == 2
    assert not prompts[0].flags.writeable
