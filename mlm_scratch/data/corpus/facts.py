"""What the bundled model learns: tables of true facts, and the phrasings that state them.

A table has one subject ("the capital of a country"). Its facts are tuples, one value per column,
and any phrasing of the table can state any fact of it:

    "The capital of {country} is {city}."  +  ("France", "Paris")
    ->  "The capital of France is Paris."

Three rules make the facts learnable by a model of less than a million parameters. A phrasing
names its subject in more than one word, so that one masked word follows from the others. Within a
table nearly every value occurs once, so that either end of a fact determines the other. And no
phrasing states the answer twice: a model that can copy it need not remember it.
"""

from typing import NamedTuple


class Table(NamedTuple):
    """Facts of one kind, and the sentences that state them."""

    category: str
    columns: tuple[str, ...]  # the names that `question` and `phrasings` use; the answer is last
    question: str
    phrasings: tuple[str, ...]
    facts: tuple[tuple[str, ...], ...]


# ---------------------------------------------------------------------------- astronomy

SKY = Table(
    category="Astronomy",
    columns=("thing", "noun", "kind"),
    question="What kind of {noun} is {thing}?",
    phrasings=(
        "{thing} is a {kind} {noun}.",
        "{thing} is a {noun} of the {kind} kind.",
        "Astronomers call {thing} a {kind} {noun}.",
        "In books about space, {thing} is described as a {kind} {noun}.",
        "What kind of {noun} is {thing}? It is a {kind} {noun}.",
        "If you ask what sort of {noun} {thing} is, the answer is {kind}.",
        "People who study space know {thing} as a {kind} {noun}.",
        "Out in space there is a {kind} {noun}, and its name is {thing}.",
        "{thing}, as space books explain, is a {kind} {noun}.",
        "Look up {thing} in a book, and you read about a {kind} {noun}.",
    ),
    facts=(
        ("Earth", "planet", "rocky"),
        ("the Milky Way", "galaxy", "spiral"),
        ("Jupiter", "planet", "gaseous"),
        ("Pluto", "planet", "dwarf"),
        ("Betelgeuse", "star", "red"),
        ("Rigel", "star", "blue"),
        ("Sirius", "star", "double"),
        ("Vega", "star", "white"),
        ("Halley", "comet", "periodic"),
        ("the Moon", "satellite", "natural"),
        ("Hubble", "telescope", "space"),
        ("the Hercules Cluster", "cluster", "globular"),
    ),
)

MOONS = Table(
    category="Astronomy",
    columns=("moon", "planet"),
    question="Which planet does the moon {moon} go around?",
    phrasings=(
        "{moon} is a moon of {planet}.",
        "The moon {moon} goes around {planet}.",
        "The moon called {moon} travels around the planet {planet}.",
        "Which planet has the moon {moon}? It is {planet}.",
        "One of the moons of the planet {planet} is {moon}.",
        "If you stood on the moon {moon}, the planet above you would be {planet}.",
        "The gravity of {planet} holds the moon {moon} in its orbit.",
        "Around the planet {planet} there is a moon, and its name is {moon}.",
        "{moon} is the name of a moon that goes around {planet}.",
        "To see the moon {moon}, point a telescope at {planet}.",
    ),
    facts=(
        ("Titan", "Saturn"),
        ("Europa", "Jupiter"),
        ("Triton", "Neptune"),
        ("Phobos", "Mars"),
        ("Titania", "Uranus"),
    ),
)

# ---------------------------------------------------------------------------- geography

CAPITALS = Table(
    category="Geography",
    columns=("country", "city"),
    question="What is the capital of {country}?",
    phrasings=(
        "The capital of {country} is {city}.",
        "The capital city of the country {country} is called {city}.",
        "The city of {city} is the capital of {country}.",
        "{country} is a country, and its capital is {city}.",
        "On a map of {country}, the capital city is marked {city}.",
        "The government of {country} sits in the capital, {city}.",
        "Which city is the capital of {country}? It is {city}.",
        "If you travel to the capital of {country}, you arrive in {city}.",
        "{country} is governed from its capital, {city}.",
        "{city} is the city where the government of {country} sits.",
    ),
    facts=(
        ("France", "Paris"),
        ("Italy", "Rome"),
        ("Spain", "Madrid"),
        ("Germany", "Berlin"),
        ("Japan", "Tokyo"),
        ("Egypt", "Cairo"),
        ("Greece", "Athens"),
        ("Norway", "Oslo"),
        ("Portugal", "Lisbon"),
        ("Austria", "Vienna"),
        ("Kenya", "Nairobi"),
        ("Peru", "Lima"),
        ("Canada", "Ottawa"),
    ),
)

LANDMARKS = Table(
    category="Geography",
    columns=("sight", "country"),
    question="In which country is {sight}?",
    phrasings=(
        "{sight} is in {country}.",
        "{sight} is a famous sight in {country}.",
        "You can visit {sight} on a journey to {country}.",
        "The country where {sight} stands is {country}.",
        "In which country is {sight}? It is in {country}.",
        "People who want to see {sight} travel to {country}.",
        "Visitors to {country} take pictures of {sight}.",
        "To find {sight} on a map, look for {country}.",
        "{country} is the country where you find {sight}.",
        "{sight} brings many visitors to {country}.",
    ),
    facts=(
        ("the Eiffel Tower", "France"),
        ("the Colosseum", "Italy"),
        ("the Great Pyramid", "Egypt"),
        ("the Taj Mahal", "India"),
        ("the Great Wall", "China"),
        ("Mount Fuji", "Japan"),
        ("Machu Picchu", "Peru"),
        ("the Acropolis", "Greece"),
        ("Uluru", "Australia"),
        ("Stonehenge", "England"),
    ),
)

CURRENCIES = Table(
    category="Geography",
    columns=("country", "money"),
    question="What money do people use in {country}?",
    phrasings=(
        "The currency of {country} is the {money}.",
        "The money of {country} is called the {money}.",
        "People in {country} pay with the {money}.",
        "When you buy bread in {country}, you pay with the {money}.",
        "What is the money used in {country}? It is the {money}.",
        "Banks in {country} count their money in the {money}.",
        "The {money} is the currency that people use in {country}.",
        "Prices in {country} are written in the {money}.",
        "{country} has its own money, the {money}.",
        "A shop in {country} takes the {money}.",
    ),
    facts=(
        ("Japan", "yen"),
        ("India", "rupee"),
        ("Russia", "ruble"),
        ("China", "yuan"),
        ("Mexico", "peso"),
        ("Britain", "pound"),
        ("Switzerland", "franc"),
        ("Turkey", "lira"),
        ("Poland", "zloty"),
    ),
)

# ---------------------------------------------------------------------------- animals

YOUNG = Table(
    category="Animals",
    columns=("animal", "young"),
    question="What is a young {animal} called?",
    phrasings=(
        "A young {animal} is called a {young}.",
        "A baby {animal} is known as a {young}.",
        "The young of a {animal} is a {young}.",
        "A mother {animal} takes care of her {young}.",
        "A {young} grows up to be a {animal}.",
        "The word for a baby {animal} is {young}.",
        "What is the name for a young {animal}? It is a {young}.",
        "When a {animal} has a baby, we call the baby a {young}.",
        "Every {animal} was once a little {young}.",
        "A {young} is the young of a {animal}.",
    ),
    facts=(
        ("dog", "puppy"),
        ("cat", "kitten"),
        ("cow", "calf"),
        ("sheep", "lamb"),
        ("horse", "foal"),
        ("pig", "piglet"),
        ("goose", "gosling"),
        ("duck", "duckling"),
        ("bear", "cub"),
        ("swan", "cygnet"),
        ("frog", "tadpole"),
        ("deer", "fawn"),
        ("kangaroo", "joey"),
    ),
)

SOUNDS = Table(
    category="Animals",
    columns=("animals", "sound"),
    question="What sound do {animals} make?",
    phrasings=(
        "When {animals} want to be heard, they {sound}.",
        "{animals} make a sound: they {sound}.",
        "The sound that {animals} make is to {sound}.",
        "You can hear {animals} when they {sound}.",
        "To talk to each other, {animals} {sound}.",
        "What sound do {animals} make? They {sound}.",
        "Listen to the {animals}, and you will hear them {sound}.",
        "Animals that {sound} are called {animals}.",
        "{animals} {sound} to call each other.",
        "{animals} are animals that {sound}.",
    ),
    facts=(
        ("dogs", "bark"),
        ("cats", "meow"),
        ("cows", "moo"),
        ("lions", "roar"),
        ("ducks", "quack"),
        ("wolves", "howl"),
        ("owls", "hoot"),
        ("bees", "buzz"),
        ("snakes", "hiss"),
        ("horses", "neigh"),
        ("frogs", "croak"),
        ("mice", "squeak"),
    ),
)

DIETS = Table(
    category="Animals",
    columns=("animal", "food"),
    question="What does the {animal} eat?",
    phrasings=(
        "The {animal} eats {food}.",
        "The {animal} lives on {food}.",
        "The food of the {animal} is {food}.",
        "The favourite meal of the {animal} is {food}.",
        "When the {animal} is hungry, it looks for {food}.",
        "What does the {animal} eat? It eats {food}.",
        "An animal that feeds on {food} is the {animal}.",
        "To feed a {animal}, give it some {food}.",
        "Give {food} to a {animal}, and it will eat.",
        "Most of what the {animal} eats is {food}.",
    ),
    facts=(
        ("panda", "bamboo"),
        ("koala", "eucalyptus"),
        ("cow", "grass"),
        ("squirrel", "nuts"),
        ("butterfly", "nectar"),
        ("penguin", "fish"),
        ("mosquito", "blood"),
        ("giraffe", "leaves"),
        ("whale", "krill"),
        ("vulture", "carrion"),
        ("termite", "wood"),
    ),
)

# ---------------------------------------------------------------------------- the body

ORGANS = Table(
    category="Biology",
    columns=("organ", "work"),
    question="What does the body use the {organ} for?",
    phrasings=(
        "The body uses the {organ} for {work}.",
        "The job of the {organ} is {work}.",
        "Nature gave the body the {organ} for {work}.",
        "Without the {organ}, the body would be no good at {work}.",
        "Why does the body have the {organ}? Because it needs help with {work}.",
        "The part of the body that is used for {work} is the {organ}.",
        "Doctors know that {work} is the job of the {organ}.",
        "Our body has the {organ} to help with {work}.",
        "For {work}, the body turns to the {organ}.",
        "People need the {organ} for {work}.",
    ),
    facts=(
        ("eyes", "seeing"),
        ("ears", "hearing"),
        ("nose", "smelling"),
        ("tongue", "tasting"),
        ("lungs", "breathing"),
        ("teeth", "chewing"),
        ("brain", "thinking"),
        ("legs", "walking"),
        ("heart", "pumping"),
        ("kidneys", "filtering"),
    ),
)

GLANDS = Table(
    category="Biology",
    columns=("organ", "juice"),
    question="What is made in the {organ}?",
    phrasings=(
        "The body makes {juice} in the {organ}.",
        "The {juice} in our body is made by the {organ}.",
        "The {juice} of the body comes from the {organ}.",
        "Doctors say that the {organ} can make {juice}.",
        "What does the body make in the {organ}? It makes {juice}.",
        "Among other things, the {organ} can make {juice}.",
        "One thing that is made inside the {organ} is {juice}.",
        "A healthy body needs the {organ} to make {juice}.",
        "{juice} is made in the {organ}.",
        "The {organ} of a healthy body can make {juice}.",
    ),
    facts=(
        ("liver", "bile"),
        ("pancreas", "insulin"),
        ("kidneys", "urine"),
        ("stomach", "acid"),
        ("mouth", "saliva"),
        ("skin", "sweat"),
        ("nose", "mucus"),
        ("bone marrow", "blood"),
    ),
)

# ---------------------------------------------------------------------------- physics, chemistry

UNITS = Table(
    category="Physics",
    columns=("quantity", "unit"),
    question="In which unit is {quantity} measured?",
    phrasings=(
        "The unit of {quantity} is the {unit}.",
        "Scientists measure {quantity} in units of one {unit}.",
        "In physics, {quantity} is given in the unit {unit}.",
        "The {unit} is the unit that is used for {quantity}.",
        "Which unit measures {quantity}? It is the {unit}.",
        "To write down {quantity}, use the unit {unit}.",
        "The unit for {quantity} that physics books use is the {unit}.",
        "When you read about the {unit}, it is a unit of {quantity}.",
        "{quantity} is measured with the unit {unit}.",
        "One {unit} is an amount of {quantity}.",
    ),
    facts=(
        ("force", "newton"),
        ("energy", "joule"),
        ("power", "watt"),
        ("frequency", "hertz"),
        ("pressure", "pascal"),
        ("resistance", "ohm"),
        ("voltage", "volt"),
        ("length", "metre"),
        ("mass", "kilogram"),
        ("time", "second"),
    ),
)

INSTRUMENTS = Table(
    category="Physics",
    columns=("tool", "quantity"),
    question="What does a {tool} measure?",
    phrasings=(
        "A {tool} measures {quantity}.",
        "A {tool} is a tool for measuring {quantity}.",
        "We use a {tool} to measure {quantity}.",
        "What does a {tool} measure? It measures {quantity}.",
        "If you want to measure {quantity}, you need a {tool}.",
        "Reading a {tool} tells you the {quantity}.",
        "The tool that measures {quantity} is called a {tool}.",
        "The number shown by a {tool} is the {quantity}.",
        "Scientists who measure {quantity} read a {tool}.",
        "With a {tool} you find out the {quantity}.",
    ),
    facts=(
        ("thermometer", "temperature"),
        ("barometer", "pressure"),
        ("clock", "time"),
        ("scale", "weight"),
        ("ruler", "length"),
        ("photometer", "brightness"),
        ("speedometer", "speed"),
        ("voltmeter", "voltage"),
        ("hygrometer", "humidity"),
    ),
)

CAUSES = Table(
    category="Physics",
    columns=("effect", "cause"),
    question="What causes {effect}?",
    phrasings=(
        "The cause of {effect} is {cause}.",
        "{effect} can be explained by {cause}.",
        "Scientists explain {effect} by {cause}.",
        "What causes {effect}? The cause is {cause}.",
        "Look behind {effect}, and you find {cause}.",
        "The reason why there can be {effect} is {cause}.",
        "If you wonder about {effect}, think of {cause}.",
        "In the end, {cause} is what leads to {effect}.",
        "{effect} can be traced back to {cause}.",
        "Science books about {effect} tell us about {cause}.",
    ),
    facts=(
        ("tides", "the Moon"),
        ("seasons", "the tilt of the Earth"),
        ("day and night", "rotation"),
        ("falling apples", "gravity"),
        ("thunder", "lightning"),
        ("rust", "oxygen"),
        ("floating boats", "buoyancy"),
        ("echoes", "reflection"),
        ("waves on the sea", "wind"),
        ("sunburn", "ultraviolet light"),
        ("warm brakes", "friction"),
    ),
)

SYMBOLS = Table(
    category="Chemistry",
    columns=("element", "symbol"),
    question="What is the chemical symbol of {element}?",
    phrasings=(
        "The chemical symbol of {element} is {symbol}.",
        "The symbol for {element} is {symbol}.",
        "In chemistry, {element} is written {symbol}.",
        "Chemists write {symbol} when they mean {element}.",
        "What is the symbol of the element {element}? It is {symbol}.",
        "The element {element} has the chemical symbol {symbol}.",
        "In the table of elements, {symbol} stands for {element}.",
        "The letters {symbol} are short for the element {element}.",
        "{element} is an element with the symbol {symbol}.",
        "The sign {symbol} means {element}.",
    ),
    facts=(
        ("gold", "Au"),
        ("silver", "Ag"),
        ("iron", "Fe"),
        ("copper", "Cu"),
        ("lead", "Pb"),
        ("tin", "Sn"),
        ("sodium", "Na"),
        ("helium", "He"),
    ),
)

# ---------------------------------------------------------------------------- everyday things

MATERIALS = Table(
    category="Everyday life",
    columns=("product", "material"),
    question="What is {product} made from?",
    phrasings=(
        "{product} is made from {material}.",
        "People make {product} from {material}.",
        "To make {product}, you start with {material}.",
        "What is {product} made from? It is made from {material}.",
        "The material that turns into {product} is {material}.",
        "In a factory that makes {product}, people work with {material}.",
        "Workers turn {material} into {product}.",
        "Someone who makes {product} works with {material}.",
        "{product} begins its life as {material}.",
        "Long before it was {product}, it was {material}.",
    ),
    facts=(
        ("glass", "sand"),
        ("paper", "wood"),
        ("bread", "flour"),
        ("cheese", "milk"),
        ("wine", "grapes"),
        ("chocolate", "cocoa"),
        ("plastic", "oil"),
        ("steel", "iron"),
        ("pottery", "clay"),
        ("cider", "apples"),
        ("ketchup", "tomatoes"),
    ),
)

COLOURS = Table(
    category="Everyday life",
    columns=("thing", "colour"),
    question="What colour is {thing}?",
    phrasings=(
        "{thing} is {colour}.",
        "The colour of {thing} is {colour}.",
        "What colour is {thing}? It is {colour}.",
        "To paint {thing}, you need the colour {colour}.",
        "Everybody can see that the colour of {thing} is {colour}.",
        "Look at {thing}, and you see the colour {colour}.",
        "If something is {colour}, it has the same colour as {thing}.",
        "In a picture book, {thing} has the colour {colour}.",
        "{thing} has a colour, and it is {colour}.",
        "When children draw {thing}, they make it {colour}.",
    ),
    facts=(
        ("grass", "green"),
        ("a ripe banana", "yellow"),
        ("snow", "white"),
        ("coal", "black"),
        ("blood", "red"),
        ("the clear sky", "blue"),
        ("a carrot", "orange"),
        ("chocolate", "brown"),
        ("a flamingo", "pink"),
        ("an elephant", "grey"),
    ),
)

COUNTS = Table(
    category="Everyday life",
    columns=("whole", "parts", "number"),
    question="How many {parts} does {whole} have?",
    phrasings=(
        "{whole} has {number} {parts}.",
        "The number of {parts} of {whole} is {number}.",
        "How many {parts} does {whole} have? It has {number}.",
        "If you count the {parts} of {whole}, you get {number}.",
        "There are {number} {parts} that belong to {whole}.",
        "Children learn that {whole} has {number} {parts}.",
        "{whole} comes with {number} {parts}.",
        "Count to {number}, and you have counted the {parts} of {whole}.",
        "Look at {whole}: it has {number} {parts}.",
        "{number} is the number of {parts} of {whole}.",
    ),
    facts=(
        ("a triangle", "sides", "three"),
        ("a spider", "legs", "eight"),
        ("an insect", "legs", "six"),
        ("a week", "days", "seven"),
        ("a year", "months", "twelve"),
        ("a minute", "seconds", "sixty"),
        ("a decade", "years", "ten"),
        ("a hand", "fingers", "five"),
        ("a bicycle", "wheels", "two"),
        ("a square", "corners", "four"),
    ),
)

# ---------------------------------------------------------------------------- science and records

SCIENCES = Table(
    category="Science",
    columns=("science", "subject"),
    question="What is {science} about?",
    phrasings=(
        "{science} is the study of {subject}.",
        "{science} is the science of {subject}.",
        "The science that studies {subject} is called {science}.",
        "People who work in {science} study {subject}.",
        "What is {science} about? It is about {subject}.",
        "A student of {science} learns about {subject}.",
        "If you want to study {subject}, choose the science of {science}.",
        "Books about {science} explain {subject}.",
        "Scientists in {science} want to understand {subject}.",
        "Without {science} we would know little about {subject}.",
    ),
    facts=(
        ("astronomy", "stars"),
        ("botany", "plants"),
        ("zoology", "animals"),
        ("geology", "rocks"),
        ("meteorology", "weather"),
        ("entomology", "insects"),
        ("ornithology", "birds"),
        ("history", "the past"),
        ("linguistics", "language"),
        ("mycology", "fungi"),
    ),
)

RECORDS = Table(
    category="Science",
    columns=("record", "holder"),
    question="What is the {record}?",
    phrasings=(
        "The {record} is {holder}.",
        "We all know that the {record} is {holder}.",
        "What is the {record}? It is {holder}.",
        "The record for being the {record} goes to {holder}.",
        "The {record} has a name: it is {holder}.",
        "In a book of records, the {record} is {holder}.",
        "No other can beat {holder}, the {record}.",
        "If you look for the {record}, you will find {holder}.",
        "{holder} holds the record: it is the {record}.",
        "They measured everything, and the {record} was {holder}.",
    ),
    facts=(
        ("largest planet around the Sun", "Jupiter"),
        ("smallest planet around the Sun", "Mercury"),
        ("hottest planet around the Sun", "Venus"),
        ("tallest animal on Earth", "the giraffe"),
        ("fastest land animal on Earth", "the cheetah"),
        ("highest mountain on Earth", "Everest"),
        ("deepest lake on Earth", "Baikal"),
        ("largest ocean on Earth", "the Pacific"),
        ("largest country on Earth", "Russia"),
        ("largest continent on Earth", "Asia"),
        ("coldest continent on Earth", "Antarctica"),
        ("hardest mineral in nature", "diamond"),
        ("lightest element in nature", "hydrogen"),
        ("largest bird on Earth", "the ostrich"),
    ),
)

DISCOVERERS = Table(
    category="Science",
    columns=("idea", "person"),
    question="Who is famous for {idea}?",
    phrasings=(
        "{person} is famous for {idea}.",
        "The famous name behind {idea} is {person}.",
        "We remember {person} for {idea}.",
        "In the history of {idea}, the great name is {person}.",
        "Who is famous for {idea}? It is {person}.",
        "If you read about {idea}, you will meet the name {person}.",
        "The world thanks {person} for {idea}.",
        "School books about {idea} tell us about {person}.",
        "{person} became famous because of {idea}.",
        "The story of {idea} is also the story of {person}.",
    ),
    facts=(
        ("the telephone", "Bell"),
        ("relativity", "Einstein"),
        ("evolution", "Darwin"),
        ("penicillin", "Fleming"),
        ("radium", "Curie"),
        ("dynamite", "Nobel"),
        ("the printing press", "Gutenberg"),
        ("the steam engine", "Watt"),
        ("the battery", "Volta"),
    ),
)

TABLES = (
    SKY,
    MOONS,
    CAPITALS,
    LANDMARKS,
    CURRENCIES,
    YOUNG,
    SOUNDS,
    DIETS,
    ORGANS,
    GLANDS,
    UNITS,
    INSTRUMENTS,
    CAUSES,
    SYMBOLS,
    MATERIALS,
    COLOURS,
    COUNTS,
    SCIENCES,
    RECORDS,
    DISCOVERERS,
)
