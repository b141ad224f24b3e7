"""Sentences of the demo corpus: a small grammar. Each sentence has exactly one of twelve command words.

The words make all 39 phones frequent, even the rare ones (ZH, OY, UH, AW, TH). The grammar makes some billion sentences. A hash
of the text decides whether train, valid or test may use it, so no sentence is in two splits.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

KEYWORDS = ("catch", "close", "follow", "join", "lift", "measure", "open", "paint", "push", "start", "stop", "wash")

_WORD_LISTS = {
    "name": """
        Adam Amy Andrew Beth Boyd Carol Charlie Claude David Duncan Edith Eva Floyd George Gina Hannah Harvey Howard Hugh
        Ian Jane Jasper Joyce Judith Julia Keith Kenneth Leo Lucy Maggie Marcus Matthew Nathan Nora Oscar Owen Paula Quincy
        Roy Ruth Sasha Sheila Susan Theo Thora Trevor Troy Victor Vivian Walter Wanda Yasmin Yvonne Zachary Zoe
    """,
    "person": """
        actor artist author baby baker barber boy brother butcher captain chef chief child cook cousin cowboy dancer doctor
        driver farmer father fisher genius giant girl guard hunter hiker judge king lawyer mason mother neighbour nurse
        pilot poet priest prince pupil queen rookie sailor scholar scout singer sister soldier student tailor teacher
        thief uncle usher voyager waiter wizard woman youth
    """,
    "animal": """
        ape badger bear beaver bee buffalo bull butterfly camel cat chicken cow crow deer dog donkey duck eagle fish fox
        frog goat goose hawk hedgehog hen horse jaguar kitten lamb leopard lion monkey moose moth mouse owl panther pigeon
        poodle rabbit raven rooster shark sheep snake spider swan thrush tiger toad turtle viper vulture wasp whale wolf
        yak zebra
    """,
    "thing": """
        anchor apple arrow bag ball banjo barrel basket bath blanket book boot bottle bowl box bread bridge broom brush
        bucket bush cake candle car carriage chair cheese cloth clock coat coin collage couch cradle crown cube cup cushion
        desk dish door drawer drum engine fence flag flower foil fork fountain garage gate glove guitar hammer hat hook
        house jacket jar jewel juice jug kettle key kite ladder lamp leather lemon letter lock luggage map mask mirage
        mirror mushroom napkin needle net oil onion oven oyster package page paper path pencil piano pie pillow pocket
        pouch present pudding puzzle ring rocket roof room rope salad shadow shawl shelf ship shoe shovel shower song soup
        spoon stage stool sugar sweater table tape tent thermos thimble thread throne thumb torch towel toy train treasure
        tree trousers trumpet tube umbrella van vase vision voice wagon wall watch wheel window wire wood wreath yacht
    """,
    "adjective": """
        ancient angry basic big black blue boiled bold brave bright broken brown casual cheap clean clever cloudy cold common
        cosy crooked cruel curious damp dark dirty dry easy empty enjoyable famous fancy foggy fresh full funny fuzzy gentle
        golden good grey happy heavy honest huge icy jolly joyful large lazy leisurely little lonely long loud loyal lucky
        massive muddy narrow nasty new noisy odd old orange outer pale perfect pink plain pleasant poor precious pretty
        proud pure purple quick quiet rich rough round royal rusty sandy shiny short silver simple slippery small smooth
        soft spoiled square strange strong sunny tall thick thin third thorny tidy tiny tough ugly unusual useful usual
        vague violet visual warm wet wide wild wooden yellow young
    """,
    "place": """
        airport attic avenue bakery bay beach canyon castle cave cellar church city cliff corner dock factory farm forest
        gallery garden harbour hill hotel island jungle kitchen lake library market meadow mine mountain museum ocean
        office palace park prison quarry river road school shop stable station street studio theatre tower town valley
        village zoo
    """,
    "preposition": "above behind below beneath beside by inside near outside over through under with",
    "adverb": """
        again alone always boldly calmly carefully cheerfully daily easily gently happily joyfully loudly nicely often
        quickly quietly rarely sadly slowly softly soon today tonight twice usually
    """,
    "verb": """
        arrives barks breathes chews cries dances digs dreams fades falls growls hides howls jumps laughs naps pauses
        points rejoices rests roars shivers shouts sighs sings sits sleeps smiles snores swims thinks vanishes waits walks
        wanders wonders yawns
    """,
    "month": "January February March April May June July August September October November December",
}

TEMPLATES = tuple(
    line.strip()
    for line in """
    {keyword} the {adjective} {thing} {preposition} the {place}
    {keyword} the {adjective} {thing}, then find the {animal}
    {name} will {keyword} the {adjective} {thing} {adverb}
    {name}, please {keyword} the {thing} in the {place}
    {adverb}, {name} and the {person} {keyword} the {thing}
    please {keyword} this {thing} and that {adjective} {thing}
    please {keyword} the {thing} {preposition} the {adjective} {animal}
    in {month} we {keyword} the {thing} {preposition} the {place}
    the {person} may {keyword} my {adjective} {thing}
    the {person} and the {animal} {keyword} this {thing} {adverb}
    the {adjective} {person} must {keyword} the {thing}, says {name}
    they {keyword} the {adjective} {thing} while the {animal} {verb}
    when the {animal} {verb}, {keyword} the {adjective} {thing}
    can the {person} {keyword} that {thing} before {month}?
    does {name} {keyword} their {thing} for the {person}?
    who can {keyword} the {adjective} {thing} of the {person}?
    """.strip().splitlines()
)

# Placeholder of the templates → the words that may replace it, none of them a keyword.
WORDS = {placeholder: tuple(words.split()) for placeholder, words in _WORD_LISTS.items()}


def split_of(text: str) -> str:
    """The split that may use this sentence: a tenth of all sentences each for ``valid`` and ``test``, the rest for ``train``."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10
    return {0: "valid", 1: "test"}.get(bucket, "train")


def sentences(split: str, seed: str) -> Iterator[tuple[str, str]]:
    """Endless different (text, keyword) pairs of one split. Every twelve successive pairs have each keyword once."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        for keyword in rng.sample(KEYWORDS, len(KEYWORDS)):
            text = _sentence(rng, keyword)
            while text in seen or split_of(text) != split:
                text = _sentence(rng, keyword)
            seen.add(text)
            yield text, keyword


def _sentence(rng: random.Random, keyword: str) -> str:
    words = []
    for word in rng.choice(TEMPLATES).split():
        start, brace, rest = word.partition("{")
        if brace:
            placeholder, _, end = rest.partition("}")
            chosen = keyword if placeholder == "keyword" else rng.choice(WORDS[placeholder])
            word = start + chosen + end
        words.append(word)
    return " ".join(words)
