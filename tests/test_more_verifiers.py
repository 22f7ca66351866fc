"""Units, tolerances, patterns, choices, JSON, language and form: what passes, what fails, what no reply can do."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.rewards.language import LANGUAGES, detect
from posttrain.rewards.patterns import compiled
from posttrain.rewards.shaping import cosine, repeated_share
from posttrain.rewards.verifiers import VERIFIERS
from posttrain.types import Message, RolloutError, Task


def task(answer: object = None, prompt: str = "?", **meta: Any) -> Task:
    return Task("t:1", "t", (Message("user", prompt),), answer, meta)


def passes(name: str, reply: str, answer: object = None, **meta: Any) -> bool:
    verdict = VERIFIERS[name](task(answer, **meta), reply)
    assert verdict.passed is (verdict.score == 1)
    return verdict.passed


@pytest.mark.parametrize(
    ("gold", "reply", "right"),
    [
        ("150 cm", "150 cm", True),
        ("150 cm", "1.5 m", True),
        ("150 cm", "1500mm", True),
        ("150 cm", "150 m", False),
        ("150 cm", "150", False),
        ("150 cm", "150 kg", False),
        ("150 cm", "The answer is 1.5 metres.", True),
        ("150 cm", r"so \boxed{1.5\text{ m}}", True),
        ("150 cm", r"$150 \, \mathrm{cm}$", True),
        ("5 kg", "5000 g", True),
        ("5 kg", "5 kilograms", True),
        ("10 m/s", "36 km/h", True),
        ("10 m/s", "36 kilometres per hour", True),
        ("10 m/s", r"10\ \frac{\text{m}}{\text{s}}", True),
        ("27.78 m/s", "100 km/h", True),
        ("28 m/s", "100 km/h", False),
        ("9.81 m/s^2", "9.81 m·s⁻²", True),
        ("9.81 m/s^2", "981 cm/s²", True),
        ("9.81 m/s^2", "9.81 m/s", False),
        ("12 cm^2", "0.0012 square metres", True),
        ("12 cm^2", r"12 \text{ cm}^{2}", True),
        ("2 L", "2000 cm^3", True),
        ("1 N", "1 kg m/s^2", True),
        ("4184 J/(kg K)", "1 cal/(g K)", True),
        ("50%", "50 per cent", True),
        ("50%", "0.5", True),
        ("50%", "50", False),
        (r"90^\circ", "90 degrees", True),
        (r"90^\circ", "1.5708 rad", True),
        (r"90^\circ", "90", False),
        ("20 °C", "293.15 K", True),
        ("20 °C", "68 °F", True),
        ("20 °C", "20 K", False),
        ("3 * 10^8 m/s", r"3 \times 10^{8} m/s", True),
        ("$5", "500 cents", True),
        ("$5", "5 euros", False),
        ("15 $ per hour", "$15 per hour", True),
        ("72", "72 apples", True),
        ("72", "72 km", True),
        ("2 hours", "120 min", True),
        ("2 hours", "<think>2 hours", False),
        ("2 hours", "", False),
        ("2 hours", "two hours", False),
    ],
)
def test_a_quantity_is_the_same_in_any_unit_of_its_kind(gold: str, reply: str, right: bool) -> None:
    assert passes("units", reply, gold) is right


def test_a_missing_unit_fails_unless_the_task_says_that_it_is_optional() -> None:
    assert not passes("units", "150", "150 cm")
    assert passes("units", "150", "150 cm", unit_optional=True)
    assert not passes("units", "1.5", "150 cm", unit_optional=True)


def test_a_gold_without_a_known_unit_is_an_error() -> None:
    for gold in ("five metres", "5 florps", "x = 3"):
        with pytest.raises(RolloutError, match="expected a number with a known unit"):
            VERIFIERS["units"](task(gold), "5")


@given(st.integers(1, 10**6), st.sampled_from(["m", "g", "s", "J", "Pa", "L"]))
def test_prefixes_are_powers_of_ten(value: int, unit: str) -> None:
    assert passes("units", f"{value}000 m{unit}", f"{value} {unit}")
    assert passes("units", f"{value} k{unit}", f"{value}000 {unit}")
    assert not passes("units", f"{value} k{unit}", f"{value} {unit}")


@pytest.mark.parametrize(
    ("gold", "tolerance", "reply", "right"),
    [
        ("100", 5, "105", True),
        ("100", 5, "106", False),
        ("100", "1%", "101", True),
        ("100", "1%", "98.9", False),
        ("-100", "1 %", "-99", True),
        ("100", 0, "100.0", True),
        ("100", 0, "100.0000001", False),
        ("3.14159", "0.002", "3.14", True),
        ("3.14159", 1e-3, "3.14", False),
    ],
)
def test_numeric_takes_the_tolerance_of_its_task(gold: str, tolerance: object, reply: str, right: bool) -> None:
    assert passes("numeric", reply, gold, tolerance=tolerance) is right


@pytest.mark.parametrize("tolerance", ["much", -1, True, "1e999", [1], float("nan")])
def test_a_tolerance_that_is_no_number_is_an_error(tolerance: object) -> None:
    with pytest.raises(RolloutError, match="tolerance="):
        VERIFIERS["numeric"](task("5", tolerance=tolerance), "5")


@pytest.mark.parametrize(
    ("gold", "reply", "right"),
    [
        (r"\frac{3}{4}", r"\boxed{0.75}", True),
        (r"\frac{a}{b}", r"$a/b$", True),
        (r"(-\infty, 2]", r"\boxed{(-\infty,2]}", True),
        (r"(-\infty, 2]", r"\boxed{(-\infty,2)}", False),
        (r"[0,1)\cup(2,3]", r"$(2,3]\cup[0,1)$", True),
        (r"\{1, 2, 3\}", r"\boxed{\{3,2,1\}}", True),
        (r"\{1, 2, 3\}", r"\boxed{\{1,2\}}", False),
        (r"\sqrt[3]{16}", r"$2\sqrt[3]{2}$", True),
    ],
)
def test_math_reads_fractions_intervals_sets_and_latex(gold: str, reply: str, right: bool) -> None:
    assert passes("math", reply, gold) is right


@pytest.mark.parametrize(
    ("pattern", "search", "reply", "right"),
    [
        (r"\d{4}-\d{2}-\d{2}", False, "2024-05-01", True),
        (r"\d{4}-\d{2}-\d{2}", False, "<think>x</think> 2024-05-01 ", True),
        (r"\d{4}-\d{2}-\d{2}", False, "on 2024-05-01", False),
        (r"\d{4}-\d{2}-\d{2}", True, "on 2024-05-01", True),
        (r"(?i)yes|no", False, "YES", True),
        (r"(?i)yes|no", False, "yes and no", False),
        ("a.c", False, "a\nc", False),
        ("grüße", False, "grüße", True),
    ],
)
def test_regex_matches_the_final_answer(pattern: str, search: bool, reply: str, right: bool) -> None:
    assert passes("regex", reply, pattern=pattern, search=search) is right


def test_no_text_makes_a_pattern_run_away() -> None:
    start = time.monotonic()
    for pattern in (r"(a+)+$", r"(a|aa)+$", r"(.*a){12}", r"(x+x+)+y"):
        for text in ("a" * 20_000 + "!", "x" * 20_000):
            VERIFIERS["regex"](task(pattern=pattern), text)
    assert time.monotonic() - start < 10  # a backtracking matcher takes longer than anyone lives


@pytest.mark.parametrize("pattern", ["(", r"(?=a)b", r"(a)\1", "a{99999}"])
def test_a_pattern_that_cannot_be_bounded_is_an_error(pattern: str) -> None:
    with pytest.raises(RolloutError, match="invalid RE2 pattern"):
        compiled(pattern)


CHOICES = ["Paris", "London", "Rome", "a dog"]


@pytest.mark.parametrize(
    ("reply", "named"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B.", "B"),
        ("B) London", "B"),
        ("B: London", "B"),
        ("B) Paris", None),
        ("London", "B"),
        ("london.", "B"),
        ("The answer is B.", "B"),
        ("The answer is (B) London.", "B"),
        ("The answer is London.", "B"),
        ("The answer is B because A is in France.", "B"),
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        ("It is in England.\n\nB", "B"),
        ("It is in England, so option B", "B"),
        ("<think>A? no</think>B", "B"),
        ("The answer is a dog.", "D"),
        ("A or B", None),
        ("A, B, C, D", None),
        ("The answer is A or B.", None),
        ("(A) or (B)", None),
        ("Both option A and option B", None),
        ("A nice city", None),
        ("E", None),
        ("", None),
    ],
)
def test_one_choice_must_be_named_and_no_other(reply: str, named: str | None) -> None:
    for letter in "ABCD":
        assert passes("multiple_choice", reply, letter, choices=CHOICES) is (letter == named), letter


def test_the_gold_choice_is_a_letter_a_text_or_a_number_from_0() -> None:
    for gold in ("C", "Rome", "rome", 2):
        assert passes("multiple_choice", "C", gold, choices=CHOICES)
    assert passes("multiple_choice", "2", "4", choices={"label": ["1", "2"], "text": ["3", "4"]})
    for wrong in ("E", 4, "Berlin"):
        with pytest.raises(RolloutError, match="not one of its choices"):
            VERIFIERS["multiple_choice"](task(wrong, choices=CHOICES), "C")
    for bad in (["one"], {"label": ["A"], "text": ["x", "y"]}, "AB"):
        with pytest.raises(RolloutError, match="choices"):
            VERIFIERS["multiple_choice"](task("A", choices=bad), "A")


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z]"},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "uniqueItems": True},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("reply", "parses", "valid"),
    [
        ('{"name": "Ada", "age": 36}', 1, 1),
        ('<think>{}</think>{"name": "Ada"}', 1, 1),
        ('Here:\n```json\n{"name": "Ada"}\n```\nDone.', 1, 1),
        ('{"name": "ada"}', 1, 0),
        ('{"name": "Ada", "age": -1}', 1, 0),
        ('{"name": "Ada", "age": 1.5}', 1, 0),
        ('{"name": "Ada", "more": 1}', 1, 0),
        ('{"name": "Ada", "tags": [1, true, "1"]}', 1, 1),
        ('{"name": "Ada", "tags": [{"a": 1}, {"a": 1.0}]}', 1, 0),
        ("{}", 1, 0),
        ('{"name": "Ada"', 0, 0),
        ('Sure! {"name": "Ada"}', 0, 0),
        ('{"name": "Ada", "age": NaN}', 0, 0),
        ('{"name": "Ada", "age": 1e999}', 0, 0),
        ('{"name": "Ada", "age": ' + "9" * 5000 + "}", 0, 0),
        ("[" * 100 + "]" * 100, 0, 0),
        ("[" * 40_000, 0, 0),
        ('"' + "a" * 60_000 + '"', 0, 0),
        ("", 0, 0),
    ],
)
def test_json_must_parse_and_fit_the_schema(reply: str, parses: int, valid: int) -> None:
    verdict = VERIFIERS["json_schema"](task(schema=PERSON), reply)
    assert (verdict.parts["parses"], verdict.parts["valid"], verdict.passed) == (parses, valid, bool(valid))


@pytest.mark.parametrize(
    "reply",
    [
        "[" + ",".join(["{}"] * 15_000) + "]",
        '["' + "a" * 40_000 + '!"]',
        '"' + '\\"' * 24_000,
        "```\n" * 10_000,
    ],
)
def test_no_reply_makes_a_schema_run_away(reply: str) -> None:
    start = time.monotonic()
    schema = {"uniqueItems": True, "items": {"pattern": "(a+)+$", "type": "string"}}
    assert not passes("json_schema", reply, schema=schema)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "florp"}, "invalid schema"),
        ("{", "invalid schema"),
        ({"properties": {"a": {"patternProperties": {"a+": {}}}}}, "patternProperties"),
        (None, "has no column 'schema'"),
        (3, "needs Mapping or str"),
    ],
)
def test_a_schema_that_cannot_be_used_is_an_error(schema: object, says: str) -> None:
    with pytest.raises(RolloutError, match=says):
        VERIFIERS["json_schema"](task(schema=schema), "{}")


def test_a_schema_is_read_from_text_too_and_fetches_nothing() -> None:
    assert passes("json_schema", "[1]", schema='{"type": "array"}')
    with pytest.raises(RolloutError, match=r"refers to 'http://example.invalid/x.json', which it does not define"):
        VERIFIERS["json_schema"](task(schema={"$ref": "http://example.invalid/x.json"}), "1")


SAID = {
    "en": "The weather is nice today, and we are going to the beach with our friends.",
    "de": "Das Wetter ist heute schön, und wir gehen mit unseren Freunden an den Strand.",
    "fr": "Il fait beau aujourd'hui et nous allons à la plage avec nos amis.",
    "es": "El tiempo es muy bueno hoy y vamos a la playa con los amigos.",
    "it": "Oggi il tempo è bello e andiamo alla spiaggia con gli amici.",
    "pt": "O tempo hoje está bom e não vamos à praia com os amigos.",
    "nl": "Het weer is vandaag mooi en wij gaan met onze vrienden naar het strand.",
    "fi": "Sää on tänään kaunis ja menemme rannalle, mutta se ei ole lämmin.",
    "vi": "Hôm nay thời tiết đẹp và chúng tôi đi ra bãi biển với bạn bè.",
    "sw": "Hali ya hewa ni nzuri leo na tunakwenda pwani kwa ajili ya marafiki.",
    "ru": "Сегодня хорошая погода, и мы идём на пляж с друзьями.",
    "bg": "Времето днес е хубаво и ние ще отидем на плажа с приятели.",
    "uk": "Сьогодні гарна погода, і ми йдемо на пляж із друзями.",
    "ar": "الطقس جميل اليوم ونحن ذاهبون إلى الشاطئ مع الأصدقاء في المساء.",
    "fa": "امروز هوا خوب است و ما با دوستان به ساحل می رویم.",
    "ur": "آج موسم اچھا ہے اور ہم دوستوں کے ساتھ ساحل پر جا رہے ہیں۔",
    "hi": "आज मौसम अच्छा है और हम दोस्तों के साथ समुद्र तट पर जा रहे हैं।",
    "mr": "आज हवामान छान आहे आणि आम्ही मित्रांसोबत समुद्रकिनारी जात आहोत.",
    "ne": "आज मौसम राम्रो छ र हामी साथीहरूसँग समुद्र किनारमा जाँदैछौं।",
    "bn": "আজ আবহাওয়া ভালো এবং আমরা সমুদ্র সৈকতে যাচ্ছি।",
    "gu": "આજે હવામાન સારું છે અને અમે દરિયાકિનારે જઈ રહ્યા છીએ.",
    "pa": "ਅੱਜ ਮੌਸਮ ਚੰਗਾ ਹੈ ਅਤੇ ਅਸੀਂ ਸਮੁੰਦਰ ਕੰਢੇ ਜਾ ਰਹੇ ਹਾਂ।",
    "kn": "ಇಂದು ಹವಾಮಾನ ಚೆನ್ನಾಗಿದೆ ಮತ್ತು ನಾವು ಕಡಲತೀರಕ್ಕೆ ಹೋಗುತ್ತಿದ್ದೇವೆ.",
    "ta": "இன்று வானிலை நன்றாக உள்ளது, நாங்கள் கடற்கரைக்குச் செல்கிறோம்.",
    "te": "ఈ రోజు వాతావరణం బాగుంది మరియు మేము బీచ్‌కి వెళ్తున్నాము.",
    "th": "วันนี้อากาศดีและเรากำลังไปชายหาดกับเพื่อน",
    "ko": "오늘은 날씨가 좋아서 우리는 친구들과 해변에 갑니다.",
    "ja": "今日は天気が良いので、友達と海に行きます。",
    "zh": "今天天气很好,我们和朋友去海滩。",
}


@pytest.mark.parametrize("code", SAID)
def test_a_sentence_is_told_by_its_script_and_its_words(code: str) -> None:
    assert code in LANGUAGES and detect(SAID[code]) == code
    assert VERIFIERS["language"](task(prompt=SAID[code]), SAID[code]).score == 1


def test_language_is_the_share_of_letters_in_the_prompt_s_language() -> None:
    prompt = task(prompt=SAID["en"])
    mixed = VERIFIERS["language"](prompt, f"<think>{SAID['en']}\n{SAID['zh']}</think> 42")
    english, chinese = (sum(map(str.isalpha, SAID[code])) for code in ("en", "zh"))
    assert mixed.score == pytest.approx(english / (english + chinese))
    assert not VERIFIERS["language"](prompt, SAID["de"]).score
    assert VERIFIERS["language"](task(prompt="2+2?", language="de"), SAID["de"]).score == 1
    assert VERIFIERS["language"](task(prompt=SAID["ru"]), r"Ответ: $x = \sin(y)$, `print(x)`.").score == 1
    assert not VERIFIERS["language"](prompt, "42").passed
    with pytest.raises(RolloutError, match="column `language`"):
        VERIFIERS["language"](task(prompt="2+2?"), "four")


def test_the_cosine_starts_level_and_ends_level() -> None:
    assert [cosine(x, 2, 1) for x in (0, 0.5, 1)] == pytest.approx([2, 1.5, 1])
    assert cosine(0.25, 2, 1) == pytest.approx(1 + 0.5 * (1 + math.sqrt(0.5)))
    assert [cosine(x, -10, 0) for x in (0, 0.5, 1)] == pytest.approx([-10, -5, 0])  # wrong: the longer the better


def test_cosine_length_pays_brevity_when_right_and_what_the_paper_pays_when_asked() -> None:
    def score(reply: str, **meta: Any) -> float:
        return VERIFIERS["cosine_length"](task("42", limit=100, **meta), reply).score

    assert score("42") > score("It is 42" + "." * 50) > 0.5
    assert score("41") == score("41" + "." * 50) == score("42".rjust(100)) == 0
    paper = {"right_short": 2, "right_long": 1, "wrong_short": -10, "wrong_long": 0, "exceed": -10}
    assert score("it must be 42".rjust(50), **paper) == pytest.approx(1.5)
    assert score("it must be 41".rjust(50), **paper) == pytest.approx(-5)
    assert score("it must be 42".rjust(100), **paper) == -10
    with pytest.raises(RolloutError, match=r"cosine_length\(limit=4000\)"):
        VERIFIERS["cosine_length"](task("42"), "42")


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("a b c d", 2, 0),
        ("a b a b", 2, 1 / 3),  # ab ba ab
        ("a a a a a", 1, 4 / 5),
        ("A a", 1, 1 / 2),
        ("a b", 3, 0),
        ("ha " * 101, 3, 98 / 99),
        ("好好好好", 1, 3 / 4),
        ("a" * 200, 1, 9 / 10),
    ],
)
def test_the_repeated_share_counts_n_grams_that_stood_before(text: str, n: int, share: float) -> None:
    assert repeated_share(text, n) == pytest.approx(share)


def test_repetition_passes_up_to_a_share() -> None:
    assert VERIFIERS["repetition"](task(n=2, most=0.4), "a b a b").passed
    assert not VERIFIERS["repetition"](task(n=2, most=0.3), "a b a b").passed
    assert VERIFIERS["repetition"](task(n=2), "a b a b").score == pytest.approx(2 / 3)
    for bad in (0, 1.5, 101):
        with pytest.raises(RolloutError, match="n="):
            VERIFIERS["repetition"](task(n=bad), "a")


READY = {
    "exact": task("Paris"),
    "numeric": task("72", tolerance="1%"),
    "math": task(r"\frac{1}{2}"),
    "units": task("5 cm"),
    "multiple_choice": task("B", choices=CHOICES),
    "regex": task(pattern="a+b"),
    "json_schema": task(schema=PERSON),
    "ifeval": task(instruction_id_list=["punctuation:no_comma"], kwargs=[{}]),
    "ifeval_loose": task(instruction_id_list=["startend:quotation"], kwargs=[{}]),
    "format": task(),
    "language": task(language="en"),
    "cosine_length": task("72", limit=100),
    "repetition": task(),
}
ODD = st.text(st.sampled_from("AB()[]{}$\\\"'<>|*#.,:;=/^%°-+0123456789 \nabmskgé,。"), max_size=80)


@pytest.mark.parametrize("name", READY)
@settings(max_examples=60)
@given(reply=st.one_of(st.text(max_size=80), ODD))
def test_no_reply_is_an_error_and_every_score_is_between_0_and_1(name: str, reply: str) -> None:
    verdict = VERIFIERS[name](READY[name], reply)
    assert 0 <= verdict.score <= 1
    assert not (verdict.passed and not reply.strip())
    assert VERIFIERS[name](READY[name], reply) == verdict


def test_an_empty_reply_passes_no_verifier() -> None:
    for name, ready in READY.items():
        for reply in ("", " ", "<think>", "<think>\n"):
            if (name, reply[:1]) != ("repetition", "<"):
                assert not VERIFIERS[name](ready, reply).passed, (name, reply)
