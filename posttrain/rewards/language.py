"""Language detection by script and common words, and a verifier for the language of a reply."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache, lru_cache

from posttrain.data.thoughts import TAG
from posttrain.rewards.judging import column, number
from posttrain.types import RolloutError, Task, Verdict

SCRIPTS: dict[str, str] = {
    "HANGUL": "ko", "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh", "THAI": "th", "GREEK": "el", "HEBREW": "he",
    "BENGALI": "bn", "GUJARATI": "gu", "GURMUKHI": "pa", "KANNADA": "kn", "MALAYALAM": "ml", "TAMIL": "ta",
    "TELUGU": "te", "ARMENIAN": "hy", "GEORGIAN": "ka", "SINHALA": "si", "LAO": "lo", "KHMER": "km", "MYANMAR": "my",
    "ETHIOPIC": "am",
}  # fmt: skip
"""Scripts used by a single language here; a script's name is the first word of its characters' Unicode names."""

WORDS: dict[str, dict[str, str]] = {
    "LATIN": {
        "en": "the of and to in is that it for was on are with as his they be at this have from or had by but not what "
        "all were we when your can there an which their if will each how she you i he do my me a",
        "de": "der die das und ist nicht ein eine zu den mit von für auf sich dem des im ich sie es wir auch als an "
        "wie wird bei oder aus hat dass sind nach um zum zur kann noch nur",
        "fr": "le la les des et est un une dans que qui pour pas sur au avec ce il elle sont nous vous je du en ou "
        "mais par plus cette ses aux être ont",
        "es": "el la los las de y que en un una es por con para no se del su al lo como más pero sus este está son muy "
        "yo mi también porque cuando hay",
        "it": "il lo la gli le di e che è un una in per non con sono del della dei alla si da come ma più anche nel "
        "questo mi ho ci al delle",
        "pt": "o os as um uma de e que em não para com por do da dos das no na se mais como mas ao é são seu sua "
        "também foi você isso pela pelo",
        "nl": "de het een en van in is dat op te zijn met voor niet aan er om ook als bij maar naar dan ze hij wij "
        "worden deze uit door heeft",
        "sv": "och att det som en på är av för med till den har de inte om ett men var jag vi du kan från när så ska",
        "da": "og at det er en på til af den for med de ikke der som et har jeg vi du kan fra når så men var skal blev",
        "fi": "ja on ei se että hän ovat oli myös mutta kun niin tai joka sekä voi kuin ole tämä sen minä sinä ovat "
        "olla jos mitä hyvin vain nyt",
        "pl": "i w nie na się to jest że z do jak ale za co tak po od czy przez są dla o ich jego był tym może",
        "cs": "a je se na že v to s z do o jsem ale jako za by si pro tak jsou po co není jak která který také",
        "ro": "și de la în a nu este că un o cu pe din pentru mai sunt care se ce sau fi au dar acest prin",
        "hu": "a az és hogy nem is egy van ez de meg csak ha mint már még el ki vagy volt azt lesz nagyon",
        "tr": "ve bir bu da de için ile çok ne var ama gibi daha olarak o ben sen mi olan en kadar değil sonra her",
        "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya ke karena ada adalah bisa atau "
        "kita mereka oleh",
        "vi": "và của là có không một được cho trong với những các người này đã để khi từ như về tôi cũng nhiều đến "
        "sẽ bạn rất thể làm",
        "sw": "na ya wa kwa ni katika za la cha hii kuwa kama lakini yake hiyo pia watu sana huu hizo ili au yangu "
        "wake wao mimi wewe hapa kila bila baada kutoka",
    },
    "CYRILLIC": {
        "ru": "и в не на я что он с как это по но они к у мы из за то все так его же вы от было быть для или о бы ещё "
        "только если есть был",
        "bg": "и на да се не за от с че в е са като по но това си ще го съм към или как има бъде също много беше който "
        "те ни може",
        "uk": "і в не на я що він з як це та до але вони у ми за то все так його ви від було бути для або ще тільки "
        "якщо є й",
    },
    "ARABIC": {
        "ar": "في من على أن إلى هذا هذه التي الذي عن مع كان ما لا هو هي أو ثم كل بعد قد كما يمكن ذلك لم بين و إن",
        "fa": "و در به از که این را با است برای آن یک خود تا کرد بر هم نیز شد می ما شما من اما هر چه بود های شود دارد",
        "ur": "کے کی میں ہے اور سے کا کو اس کہ پر ہیں نے یہ وہ ایک نہیں بھی تھا ہو کر لیے تو گیا ان جو ہم آپ ہوتا",
    },
    "DEVANAGARI": {
        "hi": "है के में की और का से को हैं पर यह कि ने एक नहीं भी था वह तो हो लिए कर इस जो अपने मैं हम आप ये हूँ साथ",
        "mr": "आहे आणि मी तो ती ते या हे च्या नाही आहेत होते करण्यासाठी एक मध्ये पण साठी असे झाले तुम्ही आम्ही मला तर "
        "केला केले होता कामावर किंवा",
        "ne": "छ र को मा का हो यो छन् लागि पनि गर्न हुन्छ भने एक तर थियो हामी म तपाईं गर्छ भएको गर्ने छैन त्यो लाई "
        "हुन् गरेको",
    },
}  # fmt: skip
"""Most common words of languages that share a script."""

LETTERS = {"vi": "ăđơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ", "fa": "پچژگ", "ur": "ٹڈڑںہھے", "ar": "ةى"}
LETTERS |= {"uk": "іїєґ", "ru": "ыэё", "bg": "ъщ", "mr": "ळ"}
"""Letters that distinguish languages that share a script."""

LANGUAGES = {*SCRIPTS.values(), *(code for languages in WORDS.values() for code in languages)}
"""ISO 639-1 codes that `detect` knows."""

_EDGES = "\"'“”‘’«»()[]{}<>.,;:!?…–—-*_#`~|/\\।॥،؛؟"
_NOT_PROSE = re.compile(
    r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\[A-Za-z]+|https?://\S+"
    rf"|(?i:{TAG.pattern})",
    re.DOTALL,
)
_SENTENCE = re.compile(r"[^.!?\n。！？।؟]+")


def language(task: Task, text: str) -> Verdict:
    """The share of the reply's letters, thinking included, that are in the prompt's language; 0 without letters.

    Computed per sentence: a sentence in another language counts 0; one too short to tell counts its letters of the
    right script. Code, formulas and links are ignored. Columns: `language` (ISO 639-1; by default detected from the
    prompt) and `least` 0.9, the share from which a reply passes. DeepSeek-R1's reward (arXiv 2501.12948).
    """
    expected = column(task, "language", str, "language") if task.meta.get("language") else detect(task.prompt)
    if expected not in LANGUAGES:
        raise RolloutError(
            f"task {task.id!r}: the language of its prompt is {expected or 'unclear'}. Set its column `language` to "
            f"one of {', '.join(sorted(LANGUAGES))}.",
            boundary="reward",
        )
    share = share_in(expected, text)
    passed = share is not None and share >= number(task, "least", 0.9, "language")
    return Verdict(share or 0.0, passed, f"{share or 0:.0%} {expected}")


def share_in(expected: str, text: str) -> float | None:
    """The share of a text's letters in a language, counted as by `language`; None for a text without letters."""
    matching = letters = 0
    for sentence in _SENTENCE.findall(_NOT_PROSE.sub(" ", text)):
        scripts = _scripts(sentence)
        count = sum(scripts.values())
        letters += count
        if count and (expected == "ja" or detect(sentence) in (expected, None)):
            matching += sum(n for script, n in scripts.items() if expected in _languages_of(script))
    return matching / letters if letters else None


def detect(text: str) -> str | None:
    """The ISO 639-1 code of a text's language, or None if it is ambiguous."""
    scripts = _scripts(text)
    if not scripts:
        return None
    script = scripts.most_common(1)[0][0]
    if script == "CJK" and scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.05 * scripts.total():
        return "ja"
    if script not in WORDS:
        return SCRIPTS.get(script)
    words = Counter(word.strip(_EDGES) for word in text.lower().split())
    letters = Counter(text.lower())
    scores = {
        code: sum(words[word] for word in common) + sum(letters[c] for c in LETTERS.get(code, ""))
        for code, common in _common(script).items()
    }
    best, second = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
    return best if scores[best] > scores[second] else None


def could_be(text: str, code: str) -> bool:
    """True if the text is in the language, or too short to tell but in its script."""
    detected = detect(text)
    if detected is not None:
        return detected == code
    scripts = _scripts(text)
    return bool(scripts) and code in _languages_of(scripts.most_common(1)[0][0])


@cache
def _common(script: str) -> dict[str, frozenset[str]]:
    return {code: frozenset(words.split()) for code, words in WORDS[script].items()}


def _scripts(text: str) -> Counter[str]:
    """Number of letters of each script in a text."""
    return Counter(_script(char) for char in text if char.isalpha())


@lru_cache(maxsize=65536)
def _script(char: str) -> str:
    return unicodedata.name(char, "UNKNOWN").replace("-", " ").split()[0]


def _languages_of(script: str) -> set[str]:
    shared = set(WORDS.get(script, {})) | {SCRIPTS.get(script, "")}
    return shared | ({"ja"} if script == "CJK" else set())
