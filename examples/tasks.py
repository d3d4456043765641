"""Four small tasks with answers that a program can check: what the example adapters are trained on.

Pure Python, so that demos and tests can use it without torch. Each task draws items from word
lists and templates with a ``random.Random``. Training and evaluation items are disjoint twice over:
the words that carry the content (names, cities, products, ...) come from separate lists, and the
remaining combinations are divided by a hash of the prompt. The sentiment task keeps its sentence
patterns apart too; the other tasks share theirs.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Split = Literal["train", "eval"]


class Item(NamedTuple):
    """One exercise: what the user says, and the answer that the task's checker compares with."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A family of exercises: the system prompt, a generator and a checker."""

    system: str
    draw: Callable[[random.Random, Split], Item]
    check: Callable[[Item, str], bool]
    """Whether a model's text answers the item."""

    def generate(self, rng: random.Random, split: Split) -> Item:
        """A random item of the split; the same ``rng`` state gives the same item."""
        while True:
            item = self.draw(rng, split)
            if split_of(item.prompt) == split:
                return item

    def messages(self, item: Item) -> list[dict[str, str]]:
        """The chat messages to send, without the answer."""
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": item.prompt},
        ]


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to: a quarter of all prompts are kept for evaluation."""
    return "eval" if zlib.crc32(prompt.encode()) % 4 == 0 else "train"


# --- words: one list a split -------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return text.split(", ")


FIRST_NAMES: dict[Split, list[str]] = {
    "train": _words(
        "Maria, James, Aisha, Peter, Elena, Hiro, Lucas, Nadia, Oscar, Grace, Ivan, Chloe, "
        "Samuel, Priya, Daniel, Ingrid, Marco, Fatima, George, Hannah, Omar, Julia, Kenji, "
        "Laura, Emma, Robert, Yuki, Bruno, Zara, Stefan, Alice, Mateo, Diana, Henry, Olga, Paul, "
        "Miriam, Jorge, Nina, Walter, Teresa, Kofi, Astrid, Simon, Irene, Tariq, Molly, Andre, "
        "Noor, Edward, Valentina, Isaac, Bianca, Ravi, Monica, Gustav, Selma, Arthur, Lucia, Emil"
    ),
    "eval": _words("Sofia, Thomas, Leila, Victor, Amara, Felix, Naomi, Hugo, Carmen, Anton"),
}
LAST_NAMES: dict[Split, list[str]] = {
    "train": _words(
        "Lopez, Smith, Khan, Novak, Rossi, Tanaka, Silva, Haddad, Berg, Murphy, Petrov, Martin, "
        "Cohen, Patel, Brown, Larsen, Conti, Mansour, Clarke, Weber"
    ),
    "eval": _words("Garcia, Olsen, Farah, Dubois, Mensah, Keller, Park, Moretti, Reyes, Lindgren"),
}
CITIES: dict[Split, list[str]] = {
    "train": _words(
        "Lisbon, Paris, Toronto, Oslo, Nairobi, Osaka, Madrid, Dublin, Vienna, Chicago, Lima, "
        "Prague, Mumbai, Boston, Athens, Sydney, Geneva, Warsaw, Dallas, Kyoto"
    ),
    "eval": _words("Berlin, Seattle, Rome, Cairo, Helsinki, Denver, Bogota, Zurich, Naples, Austin"),
}
JOBS: dict[Split, list[str]] = {
    "train": _words(
        "nurse, teacher, pilot, baker, lawyer, plumber, software engineer, dentist, chef, "
        "gardener, bus driver, journalist, architect, librarian, carpenter, fisherman, actor, "
        "welder, tailor, translator, postman, firefighter, midwife, florist, surgeon, waiter, "
        "hunter, banker, singer, taxi driver, builder, writer, barber, miner, biologist, coach"
    ),
    "eval": _words("doctor, painter, farmer, truck driver, accountant, electrician, photographer, judge"),
}
PRODUCTS: dict[Split, list[str]] = {
    "train": _words(
        "phone, blender, jacket, hotel room, pizza, headphones, novel, laptop, chair, backpack, "
        "movie, coffee maker, bicycle, lamp, concert, app"
    ),
    "eval": _words("camera, restaurant, vacuum cleaner, keyboard, mattress, museum tour, watch, soup"),
}

# --- sql: a question -> one query over three tables -----------------------------------------------

_TEXT_COLUMNS = {
    "employees": ["city", "department"],
    "products": ["category", "supplier"],
    "orders": ["city", "status"],
}
_NUMBER_COLUMNS = {
    "employees": ["age", "salary"],
    "products": ["price", "stock"],
    "orders": ["total", "quantity"],
}
_TEXT_VALUES: dict[str, dict[Split, list[str]]] = {
    "city": CITIES,
    "department": {
        "train": ["Sales", "Finance", "Legal", "Support", "Research"],
        "eval": ["Marketing", "Design", "Security"],
    },
    "category": {
        "train": ["Toys", "Books", "Garden", "Sports", "Kitchen"],
        "eval": ["Music", "Office", "Health"],
    },
    "supplier": LAST_NAMES,
    "status": {
        "train": ["shipped", "pending", "returned", "paid"],
        "eval": ["cancelled", "delivered"],
    },
}
_AGGREGATES = {
    "average": "AVG",
    "highest": "MAX",
    "lowest": "MIN",
    "total": "SUM",
}


def _draw_sql(rng: random.Random, split: Split) -> Item:
    table = rng.choice(sorted(_TEXT_COLUMNS))
    number = rng.choice(_NUMBER_COLUMNS[table])
    text = rng.choice(_TEXT_COLUMNS[table])
    value = rng.choice(_TEXT_VALUES[text][split])
    limit = rng.randint(1, 99) * rng.choice([1, 10])
    above = rng.random() < 0.5
    compare, sign = ("above", ">") if above else ("below", "<")
    match rng.randrange(6):
        case 0:
            ask = rng.choice(["List the {} of all {}.", "Show me the {} of every one of the {}."])
            return Item(ask.format(number, table), f"SELECT {number} FROM {table}")
        case 1:
            ask = rng.choice(["Show the {n} of {t} whose {c} is {v}.", "For {t} with {c} {v}, give the {n}."])
            return Item(
                ask.format(n=number, t=table, c=text, v=value),
                f"SELECT {number} FROM {table} WHERE {text} = '{value}'",
            )
        case 2:
            ask = rng.choice(["How many {t} have a {n} {c} {k}?", "Count the {t} with {n} {c} {k}."])
            return Item(
                ask.format(t=table, n=number, c=compare, k=limit),
                f"SELECT COUNT(*) FROM {table} WHERE {number} {sign} {limit}",
            )
        case 3:
            word = rng.choice(sorted(_AGGREGATES))
            return Item(
                f"What is the {word} {number} of {table} whose {text} is {value}?",
                f"SELECT {_AGGREGATES[word]}({number}) FROM {table} WHERE {text} = '{value}'",
            )
        case 4:
            word = rng.choice(sorted(_AGGREGATES))
            return Item(
                f"What is the {word} {number} for each {text} of the {table}?",
                f"SELECT {text}, {_AGGREGATES[word]}({number}) FROM {table} GROUP BY {text}",
            )
        case _:
            few = rng.randint(2, 9)
            word, order = ("highest", "DESC") if above else ("lowest", "ASC")
            return Item(
                f"Which {few} {table} have the {word} {number}?",
                f"SELECT * FROM {table} ORDER BY {number} {order} LIMIT {few}",
            )


def _normal_sql(text: str) -> str:
    """One spelling for equal queries: spaces, case of what is not quoted, and a final semicolon."""
    parts = " ".join(text.split()).removesuffix(";").strip().split("'")
    return "'".join(part if i % 2 else part.lower() for i, part in enumerate(parts))


def _check_sql(item: Item, text: str) -> bool:
    return _normal_sql(text) == _normal_sql(item.answer)


# --- json: a sentence about a person -> four fields -----------------------------------------------

_PERSON = [
    "{name}, {age}, lives in {city} and works as {a_job}.",
    "{name} is {a_job} from {city} who just turned {age}.",
    "At {age}, {name} still enjoys being {a_job} in {city}.",
    "Meet {name}: {age} years old, {job}, based in {city}.",
    "The {job} {name} ({age}) has moved to {city}.",
    "In {city} there is {a_job} called {name}, aged {age}.",
]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _draw_json(rng: random.Random, split: Split) -> Item:
    job = rng.choice(JOBS[split])
    fields = {
        "name": f"{rng.choice(FIRST_NAMES[split])} {rng.choice(LAST_NAMES[split])}",
        "age": rng.randint(18, 80),
        "city": rng.choice(CITIES[split]),
        "job": job,
    }
    prompt = rng.choice(_PERSON).format(a_job=_with_article(job), **fields)
    return Item(prompt, json.dumps(fields))


def _check_json(item: Item, text: str) -> bool:
    try:
        return bool(json.loads(text) == json.loads(item.answer))
    except json.JSONDecodeError:
        return False


# --- sentiment: a review -> positive, negative or neutral -----------------------------------------

_GOOD: dict[Split, list[str]] = {
    "train": ["great", "wonderful", "excellent", "lovely", "superb", "a joy", "reliable"],
    "eval": ["fantastic", "delightful", "amazing", "perfect"],
}
_BAD: dict[Split, list[str]] = {
    "train": ["terrible", "awful", "useless", "disappointing", "poor", "a mess", "broken"],
    "eval": ["horrible", "dreadful", "annoying", "a disaster"],
}
_REVIEWS: dict[Split, dict[str, list[str]]] = {
    "train": {
        "positive": [
            "The {p} was {good}.",
            "I thought the {p} would be {bad}, but it turned out {good}.",
            "Nothing about the {p} was {bad}; I would buy it again.",
            "My friends called the {p} {bad}. They are wrong, it is {good}.",
            "The {p} is far from {bad}. I use it with pleasure.",
            "At first the {p} seemed {bad}, now I find it {good}.",
        ],
        "negative": [
            "The {p} was {bad}.",
            "I thought the {p} would be {good}, but it turned out {bad}.",
            "Nothing about the {p} was {good}; I want my money back.",
            "My friends called the {p} {good}. They are wrong, it is {bad}.",
            "The {p} is far from {good}. I gave it away.",
            "At first the {p} seemed {good}, now I find it {bad}.",
        ],
        "neutral": [
            "The {p} arrived on {day}.",
            "I ordered the {p} in {city} and have not tried it yet.",
            "My friend asked me whether the {p} is {good} or {bad}. I do not know.",
            "The {p} comes in three colours and two sizes.",
            "Some say the {p} is {good}, some say it is {bad}. I have no opinion.",
            "The {p} from {city} costs the same as last {day}.",
        ],
    },
    "eval": {
        "positive": [
            "What a {p}! It is simply {good}.",
            "I was told that the {p} is {bad}, yet to me it is {good}.",
            "Everyone in {city} complains about the {p}, but for me it was {good}.",
        ],
        "negative": [
            "What a {p}! It is simply {bad}.",
            "I was told that the {p} is {good}, yet to me it is {bad}.",
            "Everyone in {city} loves the {p}, but for me it was {bad}.",
        ],
        "neutral": [
            "The {p} will be delivered next {day}.",
            "I cannot say if the {p} is {good} or {bad}; it is still in its box.",
            "They sell the {p} in {city} and in two other towns.",
        ],
    },
}
"""The evaluation's sentences are built in ways that training does not show."""
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def _draw_sentiment(rng: random.Random, split: Split) -> Item:
    label = rng.choice(sorted(_REVIEWS[split]))
    prompt = rng.choice(_REVIEWS[split][label]).format(
        p=rng.choice(PRODUCTS[split]),
        good=rng.choice(_GOOD[split]),
        bad=rng.choice(_BAD[split]),
        day=rng.choice(_DAYS),
        city=rng.choice(CITIES[split]),
    )
    return Item(prompt, label)


def _check_sentiment(item: Item, text: str) -> bool:
    return text.strip().lower().removesuffix(".") == item.answer


# --- pirate: a plain sentence -> the same, word by word, as a pirate says it ----------------------

_PIRATE_WORDS = {
    "hello": "ahoy",
    "my": "me",
    "you": "ye",
    "your": "yer",
    "is": "be",
    "are": "be",
    "the": "th'",
    "of": "o'",
    "and": "an'",
    "friend": "matey",
    "boss": "cap'n",
    "money": "doubloons",
    "yes": "aye",
    "house": "ship",
}
_PEOPLE: dict[Split, list[str]] = {
    "train": _words(
        "my friend, your boss, the teacher, my sister, the old man, your cousin, a friend, "
        "the boss, our friend, a tall sailor, his boss, their friend, the quiet girl, my uncle"
    ),
    "eval": _words("my boss, your friend, the neighbour, my brother, the young cook"),
}
_DOING: dict[Split, list[str]] = {
    "train": _words(
        "looking for, talking about, selling, hiding, painting, carrying, counting, throwing, "
        "finding, breaking, holding, drawing, laughing at, burning, washing, dreaming of, lifting, "
        "pulling, waiting for, writing about, moving, opening, watching, fixing, reading about"
    ),
    "eval": _words("asking for, thinking about, buying, cleaning, stealing"),
}
_THINGS: dict[Split, list[str]] = {
    "train": _words("the money, a box of apples, your boat, the map and a key, my hat, the car"),
    "eval": _words("my money, a bag of nuts, your lamp, the book and a pen, the ladder"),
}
_PLACES: dict[Split, list[str]] = {
    "train": ["in the house", "near the river", "at your school", "behind the hill"],
    "eval": ["near the house", "at my office", "behind the church"],
}
_SENTENCES = [
    "{person} is {doing} {thing} {place}.",
    "Hello {name}, {person} is {doing} {thing}.",
    "Yes, you are {doing} {thing} {place}.",
    "{name} and {person} are {doing} {thing}.",
]


def _pirate_word(word: str) -> str:
    """Replace one word by the list, or drop the g of -ing; keep its capital and what follows it."""
    core = word.rstrip(".,")
    tail = word[len(core) :]
    said = _PIRATE_WORDS.get(core.lower())
    if said is None:
        said = f"{core[:-1]}'" if core.endswith("ing") else core
    elif core[0].isupper():
        said = said[0].upper() + said[1:]
    return said + tail


def to_pirate(sentence: str) -> str:
    """The sentence as a pirate says it: every word by its rule, and "Arr!" at the end."""
    return " ".join([*map(_pirate_word, sentence.split()), "Arr!"])


def _draw_pirate(rng: random.Random, split: Split) -> Item:
    sentence = rng.choice(_SENTENCES).format(
        person=rng.choice(_PEOPLE[split]),
        name=rng.choice(FIRST_NAMES[split]),
        doing=rng.choice(_DOING[split]),
        thing=rng.choice(_THINGS[split]),
        place=rng.choice(_PLACES[split]),
    )
    sentence = sentence[0].upper() + sentence[1:]
    return Item(sentence, to_pirate(sentence))


def _check_pirate(item: Item, text: str) -> bool:
    return text.split() == item.answer.split()


TASKS: dict[str, Task] = {
    "sql": Task("Write the SQL query.", _draw_sql, _check_sql),
    "json": Task("Extract name, age, city and job as JSON.", _draw_json, _check_json),
    "sentiment": Task(
        "Answer with one word: positive, negative or neutral.", _draw_sentiment, _check_sentiment
    ),
    "pirate": Task("Say it like a pirate.", _draw_pirate, _check_pirate),
}
