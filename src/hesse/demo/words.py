"""Number words in twenty languages and their own scripts, with typing errors.

A word is spoiled letter by letter, as hasty fingers do it: the wrong letter of the same script, a letter left
out, a stray one before it, or two neighbours exchanged. A short word (one character in Chinese and Korean) is
lost at one stroke, a long one keeps a trace.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["LANGUAGES", "mistype", "spell"]

LANGUAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    # language: first and last letter of the row of keys that a slip can hit, and the words for 0 to 9
    name: (keys, tuple(words.split()))
    for name, keys, words in (
        ("English", "az", "zero one two three four five six seven eight nine"),
        ("German", "az", "null eins zwei drei vier fünf sechs sieben acht neun"),
        ("French", "az", "zéro un deux trois quatre cinq six sept huit neuf"),
        ("Spanish", "az", "cero uno dos tres cuatro cinco seis siete ocho nueve"),
        ("Polish", "az", "zero jeden dwa trzy cztery pięć sześć siedem osiem dziewięć"),
        ("Hungarian", "az", "nulla egy kettő három négy öt hat hét nyolc kilenc"),
        ("Turkish", "az", "sıfır bir iki üç dört beş altı yedi sekiz dokuz"),
        ("Vietnamese", "az", "không một hai ba bốn năm sáu bảy tám chín"),
        ("Swahili", "az", "sifuri moja mbili tatu nne tano sita saba nane tisa"),
        ("Russian", "ая", "ноль один два три четыре пять шесть семь восемь девять"),
        ("Greek", "αω", "μηδέν ένα δύο τρία τέσσερα πέντε έξι επτά οκτώ εννέα"),
        ("Armenian", "աֆ", "զրո մեկ երկու երեք չորս հինգ վեց յոթ ութ ինը"),
        ("Georgian", "აჰ", "ნული ერთი ორი სამი ოთხი ხუთი ექვსი შვიდი რვა ცხრა"),
        ("Arabic", "اغ", "صفر واحد اثنان ثلاثة أربعة خمسة ستة سبعة ثمانية تسعة"),
        ("Hebrew", "את", "אפס אחת שתיים שלוש ארבע חמש שש שבע שמונה תשע"),
        ("Hindi", "कह", "शून्य एक दो तीन चार पाँच छह सात आठ नौ"),
        ("Thai", "กฮ", "ศูนย์ หนึ่ง สอง สาม สี่ ห้า หก เจ็ด แปด เก้า"),
        ("Chinese", "一龥", "零 一 二 三 四 五 六 七 八 九"),
        ("Japanese", "あん", "ぜろ いち に さん よん ご ろく なな はち きゅう"),
        ("Korean", "가힣", "영 일 이 삼 사 오 육 칠 팔 구"),
    )
}


def spell(digits: npt.NDArray[np.integer], rng: np.random.Generator, *, errors: float = 0.32) -> list[str]:
    """Each of ``digits`` [N] as a number word of a language drawn evenly, mistyped.

    A word that errors have turned into the word for some digit is typed anew: errors blur what is meant, they
    never say something else.

    Example:
        >>> typed, = spell(np.array([7]), np.random.default_rng(0), errors=0.0)
        >>> typed in {ten[7] for _, ten in LANGUAGES.values()}
        True
    """
    languages = list(LANGUAGES.values())
    return [_spell(int(digit), *languages[rng.integers(len(languages))], rng, errors) for digit in digits]


def mistype(word: str, keys: str, rng: np.random.Generator, errors: float) -> str:
    """``word`` with an error at each letter with probability ``errors``; never empty.

    Args:
        word: any text.
        keys: the first and the last letter that a slip can hit.
        rng: where the errors come from.
        errors: probability of an error at each letter.

    Example:
        >>> mistype("seven", "az", np.random.default_rng(0), 0.0)
        'seven'
    """
    first, last = map(ord, keys)
    typed: list[str] = []
    for letter in word:
        kind = rng.integers(4) if rng.random() < errors else None
        stray = chr(rng.integers(first, last, endpoint=True))
        if kind is None:
            typed.append(letter)
        elif kind == 0:  # the wrong key
            typed.append(stray)
        elif kind == 1:  # two keys at once
            typed += [stray, letter]
        elif kind == 2:  # exchanged with the letter before it
            typed.insert(max(len(typed) - 1, 0), letter)
        # and the fourth kind is a key not hit
    return "".join(typed) or stray


def _spell(digit: int, keys: str, words: tuple[str, ...], rng: np.random.Generator, errors: float) -> str:
    while True:
        typed = mistype(words[digit], keys, rng, errors)
        if typed == words[digit] or typed not in _EVERY_WORD:
            return typed


_EVERY_WORD = {word for _, words in LANGUAGES.values() for word in words}
