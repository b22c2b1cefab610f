"""The words and sentences of the synthetic world: kinds of entity, their name parts, and their relations.

Each kind has its own name words, so that a name word points to one kind; names of one kind share words (near names). A
relation's object is another entity (`target`) or a word of a closed list (`values`). In the sentences {s} is the subject,
{o} the object.
"""

from __future__ import annotations

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    words = tuple(text.split())
    if len(set(words)) != len(words):
        raise ValueError(f"a word stands twice in {text[:40]}")
    return words


YEARS = tuple(str(year) for year in range(1900, 2000))

COUNTRIES = _words(
    "Arvonia Belmark Cordova Drenland Estovar Fennmark Galdora Hestria Istrenia Jorvania Kelmarch Lathonia Morvia Norland Ostrava "
    "Pellandia Quoria Rosmark Selvania Tarvia"
)
OCCUPATIONS = _words(
    "painter chemist lawyer pianist surgeon sailor botanist architect historian poet engineer dancer astronomer teacher sculptor banker"
)
GENRES = _words("comedy western thriller musical drama documentary fantasy romance satire mystery")
SUBJECTS = _words("war friendship exile music farming magic travel justice childhood medicine winter ambition")
INDUSTRIES = _words("steel textiles shipping software paper glass mining insurance furniture radios bicycles chocolate")
PRODUCTS = _words("cheese lace wine salt pottery honey clocks leather marble apples beer ropes carpets candles")
SPORTS = _words("football hockey rowing cricket rugby handball curling polo")
SEAS = ("Amber Sea", "Bitter Sea", "Coral Sea", "Dusk Sea", "Iron Sea", "Jade Sea", "Pale Sea", "Whale Sea")
MOUNTAINS = ("Arrow Hills", "Bronze Hills", "Cinder Hills", "Dragon Hills", "Eagle Hills", "Ghost Hills", "Lonely Hills", "Thunder Hills")


@dataclass(frozen=True)
class Relation:
    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    target: str | None = None  # the kind of the object, or None where it is a value
    values: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()  # noun phrases for the object, which make the first hop of a bridge question
    order: tuple[str, ...] = ()  # comparison of years: which is earlier (first half) or later (second half)
    same: tuple[str, ...] = ()  # comparison of values: yes or no


@dataclass(frozen=True)
class Kind:
    name: str
    share: float  # of the pool's chunks
    pattern: str  # how the name's parts become the name
    first: tuple[str, ...]
    last: tuple[str, ...]
    pronouns: tuple[str, ...]
    relations: tuple[Relation, ...]
    merged: tuple[tuple[tuple[str, ...], str], ...] = ()  # one sentence for several relations


PERSON = Kind(
    "person", 0.30, "{} {}",
    _words(
        "Ada Albert Alma Anders Beatrice Bruno Carla Cedric Clara Conrad Daphne David Edith Edmund Elsa Emil Esther Felix Flora "
        "Frank Gerda Gilbert Greta Gustav Hanna Harold Helga Henry Ida Igor Irma Isaac Ivy Jacob Jane Joseph Judith Julius "
        "Karen Karl Laura Leo Lena Louis Lucy Marcus Martha Max Mona Nathan Nina Norman Olga Oscar Paula Peter Petra Philip "
        "Rita Robert Rosa Rupert Ruth Samuel Sarah Simon Stella Stefan Thea Theodor Una Ulrich Vera Victor Wanda Walter Yvonne "
        "Xavier Zelda Zoltan"
    ),
    _words(
        "Abbott Adler Amos Archer Baxter Becker Bishop Brandt Carver Castle Clement Crane Dalton Decker Doyle Draper Easton "
        "Ellis Engel Falk Fischer Fleming Forster Garner Gibson Glover Grant Hale Harper Holt Hubert Ingram Irving Jarvis "
        "Jensen Keller Kemp Kruger Lambert Larsen Lennox Linden Mallory Mercer Miller Morton Nash Newman Nolan Norris Olsen "
        "Osborn Palmer Parker Pratt Quinn Ramsey Reeves Ritter Rowland Sawyer Schuster Sheldon Slater Tanner Thorne Turner "
        "Tyler Underhill Upton Vance Vogel Wagner Walsh Weber Wexler Yates York Zeller Zimmer"
    ),
    ("She", "He"),
    (
        Relation(
            "birthplace",
            ("{s} was born in {o}.", "{s} came into the world in {o}.", "The birthplace of {s} is {o}."),
            ("Where was {s} born?", "In which town was {s} born?", "What is the birthplace of {s}?"),
            target="town", phrases=("the birthplace of {s}", "the town where {s} was born"),
        ),
        Relation(
            "birth_year",
            ("{s} was born in the year {o}.", "The year of birth of {s} is {o}."),
            ("When was {s} born?", "In which year was {s} born?"),
            values=YEARS,
            order=("Who was born earlier, {a} or {b}?", "Who is older, {a} or {b}?", "Who was born later, {a} or {b}?",
                   "Who is younger, {a} or {b}?"),
        ),
        Relation(
            "country",
            ("{s} comes from {o}.", "{s} is a citizen of {o}."),
            ("Which country does {s} come from?", "Of which country is {s} a citizen?"),
            values=COUNTRIES,
            same=("Do {a} and {b} come from the same country?", "Are {a} and {b} citizens of the same country?"),
        ),
        Relation(
            "occupation",
            ("{s} works as a {o}.", "{s} earns a living as a {o}."),
            ("What is the occupation of {s}?", "What does {s} work as?"),
            values=OCCUPATIONS,
            same=("Do {a} and {b} have the same occupation?",),
        ),
    ),
    (
        (("birthplace", "birth_year"), "{s} was born in {birthplace} in {birth_year}."),
        (("occupation", "country"), "{s} is a {occupation} from {country}."),
    ),
)  # fmt: skip

FILM = Kind(
    "film", 0.16, "The {} {}",
    _words(
        "Silver Golden Broken Silent Hidden Crimson Frozen Burning Distant Empty Endless Fading Gentle Hollow Last Lost "
        "Midnight Narrow Painted Quiet Restless Secret Shining Sleeping Stolen Velvet Wandering Wicked Wooden Yellow Ancient "
        "Bitterest Clever Dancing Electric Foolish Glass Hungry Invisible Jealous Lucky Missing Noble Perfect Rusty Savage "
        "Tender Unknown Violent Weary"
    ),
    _words(
        "Garden Harbor Mirror Letter Castaway Bridge Window Forest Island Journey Kingdom Lantern Mountain Necklace Orchard "
        "Palace Promise Road Shadow Ship Station Stranger Summer Sunset Theatre Tower Train Valley Violin Voyage Wedding Wolf "
        "Butterfly Carnival Desert Dream Engine Feather Guest Hotel Jewel Key Ladder Meadow Night Ocean Parade Rose Soldier "
        "Tiger"
    ),
    ("It", "The film"),
    (
        Relation(
            "director",
            ("{s} was directed by {o}.", "The director of {s} is {o}.", "{s} is the work of director {o}."),
            ("Who directed {s}?", "Who is the director of {s}?"),
            target="person", phrases=("the director of {s}", "the person who directed {s}"),
        ),
        Relation(
            "star",
            ("{s} stars {o}.", "{o} plays the lead in {s}."),
            ("Who is the star of {s}?", "Who plays the lead in {s}?"),
            target="person", phrases=("the star of {s}", "the person who plays the lead in {s}"),
        ),
        Relation(
            "release",
            ("{s} was released in {o}.", "{s} came to the cinemas in {o}."),
            ("When was {s} released?", "In which year did {s} come to the cinemas?"),
            values=YEARS,
            order=("Which film was released earlier, {a} or {b}?", "Which film was released later, {a} or {b}?"),
        ),
        Relation(
            "genre",
            ("{s} is a {o}.", "{s} belongs to the genre {o}."),
            ("What is the genre of {s}?", "To which genre does {s} belong?"),
            values=GENRES,
            same=("Do {a} and {b} belong to the same genre?",),
        ),
    ),
    ((("genre", "release", "director"), "{s} is a {genre} from {release}, directed by {director}."),
     (("genre", "director"), "{s} is a {genre} directed by {director}."),
     (("release", "star"), "{s} was released in {release} and stars {star}.")),
)  # fmt: skip

BOOK = Kind(
    "book", 0.14, "{} of {}",
    _words(
        "Song Tale Book House Daughter Chronicle Garland Riddle Legend Nocturne Echo Portrait Ballad Diary Keeper Prisoner "
        "Memory Language Kingdoms Season Theory Shape Children Master Crown Atlas Voices Gospel Harvest Anatomy Taste Fable "
        "Republic Museum Alphabet Empire Weight Lament Scholar Pilgrim"
    ),
    _words(
        "Thorns Stars Smoke Saffron Sparrows Ravens Stones Silk Thunderclaps Dust Embers Moonlight Tides Feathers Wolves Roses "
        "Rust Shadows Sorrow Snow Sand Storms Swords Tigers Clouds Candlelight Ivory Velvets Autumn Bees Bells Bones Cedars "
        "Doves Fog Foxes Gardens Hope Ink Lions"
    ),
    ("It", "The book"),
    (
        Relation(
            "author",
            ("{s} was written by {o}.", "The author of {s} is {o}.", "{o} wrote {s}."),
            ("Who wrote {s}?", "Who is the author of {s}?"),
            target="person", phrases=("the author of {s}", "the person who wrote {s}"),
        ),
        Relation(
            "published",
            ("{s} was published in {o}.", "{s} first appeared in print in {o}."),
            ("When was {s} published?", "In which year did {s} appear in print?"),
            values=YEARS,
            order=("Which book was published earlier, {a} or {b}?", "Which book was published later, {a} or {b}?"),
        ),
        Relation(
            "subject",
            ("{s} tells a story about {o}.", "The subject of {s} is {o}."),
            ("What is the subject of {s}?", "What does {s} tell a story about?"),
            values=SUBJECTS,
            same=("Do {a} and {b} have the same subject?",),
        ),
    ),
    ((("subject", "author"), "{s} by {author} tells a story about {subject}."),
     (("author", "published"), "{s} was written by {author} and published in {published}.")),
)  # fmt: skip

COMPANY = Kind(
    "company", 0.14, "{} {}",
    _words(
        "Acton Borealis Calder Dynex Elmwood Fulton Granger Halcyon Imperion Juniper Kestrel Lumen Meridian Nimbus Orbex "
        "Paragon Quantum Redwood Sterling Titan Umbra Vanguard Westbrook Xenon Yarrow Zenith Apex Beacon Cobalt Delphi Ember "
        "Falconer Gemini Horizon Ionic Jupiter Keystone Lodestar Magnet Nova"
    ),
    _words(
        "Works Industries Brothers Foundry Mills Group Holdings Partners Systems Laboratories Trading Union Company Factory "
        "Associates Enterprises Manufacturing Syndicate Traders Workshop Concern Combine Exports Supply Yard Press Depot Forge "
        "Guild Agency"
    ),
    ("It", "The company"),
    (
        Relation(
            "founder",
            ("{s} was founded by {o}.", "The founder of {s} is {o}.", "{o} set up {s}."),
            ("Who founded {s}?", "Who is the founder of {s}?"),
            target="person", phrases=("the founder of {s}", "the person who founded {s}"),
        ),
        Relation(
            "seat",
            ("{s} has its headquarters in {o}.", "{s} is based in {o}."),
            ("Where is {s} based?", "In which town does {s} have its headquarters?"),
            target="town", phrases=("the town where {s} is based", "the home town of {s}"),
        ),
        Relation(
            "founded",
            ("{s} was founded in {o}.", "{s} opened its doors in {o}."),
            ("When was {s} founded?", "In which year did {s} open its doors?"),
            values=YEARS,
            order=("Which company was founded earlier, {a} or {b}?", "Which company was founded later, {a} or {b}?"),
        ),
        Relation(
            "industry",
            ("{s} makes its money in {o}.", "{s} deals in {o}."),
            ("What does {s} deal in?", "In what does {s} make its money?"),
            values=INDUSTRIES,
            same=("Do {a} and {b} make their money in the same industry?",),
        ),
    ),
    ((("industry", "seat"), "{s} is a name in {industry}, based in {seat}."),
     (("founder", "founded"), "{s} was founded by {founder} in {founded}.")),
)  # fmt: skip

TEAM = Kind(
    "team", 0.08, "The {} {}",
    _words(
        "Azure Black Blue Brown Emerald Flying Green Grey Heroic Indigo Jolly Laughing Maroon Mighty Navy Orange Pink Purple "
        "Red Roaring Royal Ruby Running Sapphire Scarlet Speedy Sunny Swift Tall Teal Turquoise Valiant Violet White Wild Young "
        "Brave Bold Fierce Proud"
    ),
    _words(
        "Badgers Bears Beavers Buffaloes Bulls Cobras Cougars Cranes Crows Dolphins Eagles Falcons Frogs Goats Hares Hawks "
        "Hornets Horses Hounds Jackals Kites Leopards Lynxes Mammoths Moose Otters Owls Panthers Pelicans Penguins Rams Rhinos "
        "Sharks Spiders Stags Swallows Swans Tortoises Turtles Vipers"
    ),
    ("It", "The team"),
    (
        Relation(
            "coach",
            ("{s} trains under coach {o}.", "The coach of {s} is {o}."),
            ("Who coaches {s}?", "Who is the coach of {s}?"),
            target="person", phrases=("the coach of {s}", "the person who coaches {s}"),
        ),
        Relation(
            "ground",
            ("{s} plays its home games in {o}.", "The home ground of {s} lies in {o}."),
            ("Where does {s} play its home games?", "In which town does the home ground of {s} lie?"),
            target="town", phrases=("the town where {s} plays its home games",),
        ),
        Relation(
            "sport",
            ("{s} competes in {o}.", "The sport of {s} is {o}."),
            ("In which sport does {s} compete?", "What is the sport of {s}?"),
            values=SPORTS,
            same=("Do {a} and {b} compete in the same sport?",),
        ),
    ),
    ((("sport", "ground"), "{s} competes in {sport} and plays its home games in {ground}."),),
)  # fmt: skip

TOWN = Kind(
    "town", 0.12, "{} {}",
    _words(
        "North South East West Upper Lower Old New Great Little Saint Port Fort Mount Lake King Queen Abbot Monk Mason High "
        "Deep Long Short Dry Wet Cold Warm Fair Grand Holy Inner Outer Middle Far Near Clear Dark Bright Stone"
    ),
    _words(
        "Alder Ashby Barrow Birch Brook Calvert Chester Cross Dale Dover Elm Ferry Field Gate Glen Grove Haven Hythe Holm Hurst "
        "Kirk Landing Lea Marsh Mere Mill Moor Nook Oak Pond Ridge Shaw Spring Stead Thorpe Vale Well Wick Wold Wharf"
    ),
    ("It", "The town"),
    (
        Relation(
            "river",
            ("{s} lies on the {o}.", "The {o} runs through {s}."),
            ("Which river runs through {s}?", "On which river does {s} lie?"),
            target="river", phrases=("the river that runs through {s}",),
        ),
        Relation(
            "product",
            ("{s} is known for its {o}.", "People come to {s} for its {o}."),
            ("What is {s} known for?", "What do people come to {s} for?"),
            values=PRODUCTS,
            same=("Are {a} and {b} known for the same thing?",),
        ),
        Relation(
            "charter",
            ("{s} obtained its charter in {o}.", "{s} received its charter in {o}."),
            ("When did {s} obtain its charter?", "In which year did {s} receive its charter?"),
            values=YEARS,
            order=("Which town received its charter earlier, {a} or {b}?", "Which town received its charter later, {a} or {b}?"),
        ),
    ),
    ((("river", "product"), "{s} lies on the {river} and is known for its {product}."),),
)  # fmt: skip

RIVER = Kind(
    "river", 0.06, "{} {}",
    _words(
        "Arden Bela Corra Dunva Elwy Fenna Garra Hulda Isar Jora Kelva Lorna Mura Neva Orla Pesca Quill Rhona Senna Tavra Ulna "
        "Vessa Wenna Yara Zora Amra Brenta Cresta Delva Ebra Firth Gamla Havra Inda Jasna Korva Leda Misa Narva Ossa"
    ),
    _words(
        "Water Stream Beck Burn Creek Run Race Flow Canal Branch Fork Reach Rapids Brooklet Torrent Channel Current Drift Bend "
        "Course Bayou Rill Wash Ford Cascade"
    ),
    ("It", "The river"),
    (
        Relation(
            "mouth",
            ("{s} flows into the {o}.", "{s} meets the {o}."),
            ("Into which sea does {s} flow?", "Which sea does {s} meet?"),
            values=SEAS,
            same=("Do {a} and {b} flow into the same sea?",),
        ),
        Relation(
            "spring",
            ("{s} rises in the {o}.", "{s} begins in the {o}."),
            ("Where does {s} rise?", "In which hills does {s} begin?"),
            values=MOUNTAINS,
            same=("Do {a} and {b} rise in the same hills?",),
        ),
    ),
    ((("spring", "mouth"), "{s} runs from the {spring} to the {mouth}."),),
)  # fmt: skip

KINDS = {kind.name: kind for kind in (PERSON, FILM, BOOK, COMPANY, TEAM, TOWN, RIVER)}
