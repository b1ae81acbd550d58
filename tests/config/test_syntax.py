"""Items, lists, quotes and brackets, before anything has a meaning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.refusal import refused
from tests.config.strategies import awkward_text
from virtio_mem.config import ConfigError
from virtio_mem.config.syntax import quote, read_list, read_options, split, unquote

KNOWN = ("a", "b")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [""]),
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        (",", ["", ""]),
        ("[a,b],c", ["[a,b]", "c"]),
        ("[[a,b],[c,d]],e", ["[[a,b],[c,d]]", "e"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ('"[",c', ['"["', "c"]),
        ('["]",a],b', ['["]",a]', "b"]),
    ],
)
def test_split_keeps_quotes_and_brackets_whole(text: str, parts: list[str]) -> None:
    assert split("x", text, ",") == parts


@pytest.mark.parametrize(
    ("text", "limit"),
    [("]", "without its ["), ("a],[b", "without its ["), ("[", "without its ]"), ("[[a]", "without its ]")],
)
def test_unbalanced_brackets_are_refused(text: str, limit: str) -> None:
    with refused("x", text, limit):
        split("x", text, ",")


@pytest.mark.parametrize("text", ['"', '"""', 'a"b', '"a""', '["]'])
def test_a_quote_that_does_not_end_is_refused(text: str) -> None:
    with refused("x", text, "quote that does not end"):
        split("x", text, ",")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ('""', ""),
        ('""""', '"'),
        ('""""""', '""'),
        ('"a"', "a"),
        ('"a""b"', 'a"b'),
        ('a""b', "ab"),
        ('a"b"c', "abc"),
        # Two vectors that Cloud Hypervisor tests its parser with.
        ('"@""b"', '@"b'),
        ('a\u03b2"a"""', 'a\u03b2a"'),
    ],
)
def test_two_quotes_side_by_side_inside_quotes_are_one(text: str, plain: str) -> None:
    assert unquote(text) == plain


def naive_unquote(text: str) -> str:
    """The rule one character after the other: a quote right behind a closing quote is a plain one, and opens again."""
    plain, quoted, previous = "", False, ""
    for character in text:
        if character == '"':
            plain += '"' if previous == '"' and not quoted else ""
            quoted = not quoted
        else:
            plain += character
        previous = character
    return plain


@given(st.text('"ab').filter(lambda text: text.count('"') % 2 == 0))
def test_unquote_agrees_with_the_rule_character_by_character(text: str) -> None:
    assert unquote(text) == naive_unquote(text)


@given(st.lists(awkward_text(), min_size=1))
def test_quoted_texts_are_kept_apart_and_unquote_to_themselves(texts: list[str]) -> None:
    for separator in ",:":
        parts = split("x", separator.join(f"[{quote(text)}]" for text in texts), separator)
        assert [unquote(part[1:-1].strip()) for part in parts] == texts


@pytest.mark.parametrize("text", ["mem0", "/dev/shm", "a:b", "a@b=c", ""])
def test_text_without_special_characters_gets_no_quotes(text: str) -> None:
    assert quote(text) == text


def test_options_are_read_by_key() -> None:
    assert read_options("--x", " a = 1 , b=[1,2]=3", KNOWN) == {"a": "1", "b": "[1,2]=3"}
    assert read_options("--x", "b=,a=", KNOWN) == {"a": "", "b": ""}
    assert read_options("--x", "  ", KNOWN) == {}


@pytest.mark.parametrize("item", ["", "a", "7", " "])
def test_an_item_without_an_equals_sign_is_refused(item: str) -> None:
    with refused("--x", item, "key=value"):
        read_options("--x", f"b=1,{item}", KNOWN)


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with refused("--x c", "1", "no such key"):
        read_options("--x", "c=1", KNOWN)
    with pytest.raises(ConfigError, match="the keys are a, b"):
        read_options("--x", "=1", KNOWN)


def test_a_key_given_twice_is_refused() -> None:
    with refused("--x a", "2", "was given before, as 1"):
        read_options("--x", "a=1,b=1,a=2", KNOWN)


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        ("a", ["a"]),
        ("a:b", ["a", "b"]),
        ("[a]", ["a"]),
        ("[a,b]", ["a", "b"]),
        ("[ a , b ]", ["a", "b"]),
        ("[a:b,c]", ["a:b", "c"]),
        ('"a:b":c', ['"a:b"', "c"]),
        ('["a,b",c]', ['"a,b"', "c"]),
        ("[[a,b],c]", ["[a,b]", "c"]),
        ("a[1:2]:b", ["a[1:2]", "b"]),
    ],
)
def test_lists_are_cut_at_colons_or_between_brackets_at_commas(text: str, elements: list[str]) -> None:
    assert read_list("x", text) == elements


@pytest.mark.parametrize("text", ["[]", "[a,]", "[,a]", "a::b", ":", ":a", "[ ]"])
def test_a_list_with_an_empty_element_is_refused(text: str) -> None:
    with refused("x", text, "empty element"):
        read_list("x", text)


def test_a_list_that_the_brackets_do_not_enclose_is_refused() -> None:
    with refused("x", "[a]b", "behind its list"):
        read_list("x", "[a]b")
    with refused("x", "a]:[b", "without its ["):
        read_list("x", "[a]:[b]")
