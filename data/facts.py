"""Made-up people and questions about them: facts for the weights, or behind a tool that looks them up.

    python data/facts.py --stats                   # "notes": four attributes, 31.25 bits a person
    python data/facts.py --kind bios --stats       # biographies of six sentences, 47.59 bits a person

in the weights    user: birth_date NAME ?   assistant: 4/11/1987 END
by the tool       user: birth_date NAME ?   assistant: FIND birth_date FOR NAME CALL
                  tool: 4/11/1987 ANSWER    assistant: 4/11/1987 END

Trained on is what the assistant says, never what the tool says. Nothing here draws from a random generator but
`biography`: people, what is held out and which question is asked come from one hash, the same on every machine.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ is on the path
import flags  # noqa: F401  it minds Ctrl-C while the next lines take their seconds

import contextlib
import difflib
import functools
import itertools
import math
import random
import re
import sqlite3
import time
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from data.multiplication import pair_hash
from data.tokens import Bytes, open_or_train
from experiment import Parser, UserError, bounded, command

TYPES = 16  # hidden types that attributes depend on where alpha is below 1

# --- Words: all made here, or out of these pieces ---


def _products(*pieces):
    """Every way to take one of each: _products("a b", "c d") is ["ac", "ad", "bc", "bd"]; underscores are spaces."""
    return ["".join(parts).replace("_", " ") for parts in itertools.product(*(piece.split() for piece in pieces))]


SYLLABLES = _products("b d f g h k l m n p r s t v w z", "a e i o")
FIRST = _products("Al Be Cor Da El Fe Gar Ha Is Jo Ka Lo Mar No Or Per Ro Sel Tha Wil",
                  "bert bin da dan dra fin ga lan la len lia min mund na nelle ric ron ta vin wyn")
MIDDLE = _products("An Bra Cla De Em Fra Gre Hu In Jas Ke Lu Mo Ne Os Pau Qui Ru Ste Tri",
                   "bel by cey den don dith fred gan gard lyn lis mer mon nard ny rick sa son ston ton")
LAST = _products("Ash Black Bran Cald Dun East Fair Glen Hal Hart Hol Kel Lang Mor North Oak Pen Rad Red Rock Shel "
                 "Stan Wake West Whit",
                 "acre bank bourne bridge brook burn bury by combe cote croft dale den field fold ford gate ham hill "
                 "holme house hurst land ley low man mead mere more ridge shaw side stead stone thorpe ton ward well "
                 "wick wood")
CITY_FIRST = "Port Lake Mount Fort New Old East West North South Saint Upper Lower Grand Little"
CITY_SECOND = ("_Amber _Birch _Coral _Ember _Falcon _Garnet _Hazel _Iris _Juniper _Kestrel _Linden _Maple _Opal _Robin "
               "_Willow")
CITIES = _products(CITY_FIRST, CITY_SECOND)
CONTINENTS = ["Africa", "Antarctica", "Asia", "Europe", "North America", "Oceania", "South America"]
TRADE_FIRST = "book brick clock glass grain ship silk stone tea wood"
TRADE_SECOND = "_buyer _carrier _collector _designer _inspector _maker _mender _painter _seller _teacher"
TRADES = _products(TRADE_FIRST, TRADE_SECOND)
UNIVERSITIES = [form.format(word) for word in
                "Alderton Bexmoor Calder Dunmore Elsworth Farrow Gilden Harlow Innis Jarrow Kelso Lorne Marden Norvale "
                "Orwick Penrose Quarry Ravenhill Selwyn Thornby".split() for form in
                ("{} Academy", "{} Agricultural College", "{} Business School", "{} Christian College",
                 "{} City University", "{} College", "{} Conservatory", "{} Free University",
                 "{} Institute of Technology", "{} Medical School", "{} Polytechnic", "{} State University",
                 "Royal College of {}", "Technical University of {}", "University of {}")]
FIELDS = """
accounting acoustics aerospace_engineering agronomy anatomy animal_science anthropology archaeology architecture
art_history astronomy audiology biochemistry biophysics botany brewing_science ceramics chemical_engineering chemistry
chinese_studies choreography cinematography civil_engineering classics cognitive_science computer_science criminology
crystallography dairy_science dentistry dermatology drama ecology econometrics economics education electronics
entomology epidemiology ethics fashion_design film_studies finance fine_arts fisheries folklore food_science forestry
game_design genetics geodesy geography geology geophysics graphic_design history horticulture hydrology immunology
industrial_design journalism landscape_design law library_science linguistics literature logic logistics marketing
mathematics mechanical_engineering metallurgy meteorology microbiology mineralogy music_theory nautical_science
neuroscience nursing nutrition oceanography optics painting palaeontology pharmacy philosophy physics physiotherapy
political_science printmaking psychology robotics sculpture sociology soil_science statistics theology toxicology
veterinary_medicine zoology
"""
FIELDS = [field.replace("_", " ") for field in FIELDS.split()]
EMPLOYERS = _products("Arrow Beacon Compass Delta Echo Fable Granite Harbor Indigo Jasper Keystone Lantern Meridian "
                      "Nimbus Onyx Pioneer Quartz River Summit Tundra Umber Vertex Wander Xenon Yonder Zenith Anchor "
                      "Basalt Cobalt Drift", "_Airways _Bank _Foods _Instruments _Insurance _Labs _Motors _Press "
                                             "_Textiles")[:263]
WORK_CITIES = [(37 * i + 11) % 200 for i in range(263)]  # the employer's city, a place in CITIES: says nothing new

# --- Sentences. {they}, {their}: the name (and 's) where the person has not been named yet, else he or she and his or
# her; {he}, {his}, {him}: never the name. ---

SENTENCES = {
    "birthday": """
{they} was born on {value}.
{their} birthday is {value}.
{they} came into the world on {value}.
On {value}, {they} was born.
{their} date of birth is {value}.
{they} has counted {his} years from {value}.
The calendar read {value} when {they} was born.
{their} life began on {value}.
It was on {value} that {they} drew {his} first breath.
{their} parents held {him} for the first time on {value}.
{they} first opened {his} eyes on {value}.
A registrar wrote down {value} as the day {they} was born.
{their} passport gives {value} as {his} date of birth.
{they} arrived, loud and healthy, on {value}.
The candles on {their} cakes all go back to {value}.
Ask when {they} was born and the answer is {value}.
{their} story starts on {value}.
{they} blew out {his} very first candle one year after {value}.
The family Bible puts {their} birth on {value}.
{they} is said to have been born at dawn on {value}.
The hospital's records for {value} mention that {they} was born.
{their} mother remembers {value} as the day {he} was born.
Since {value}, the day {he} was born, {they} has never liked mornings.
Every form that {they} fills in says {value} under date of birth.
{they} saw daylight for the first time on {value}.
{value} was the day on which {they} was born.
{value} is printed on {their} birth certificate.
When {they} was born, it was {value}.
{they} shares a birthday with everyone born on {value}.
The date that {they} will never forget is {value}, {his} birthday.
{their} horoscope is cast for {value}.
A midwife delivered {him} on {value}, and {they} has been busy ever since.
{their} age is reckoned from {value}.
{they} gives {value} whenever somebody asks for {his} birthday.
Snow or sunshine, nobody recalls the weather of {value}, when {they} was born.
{their} first day on this earth was {value}.
To work out how old {they} is, start from {value}.
{they} entered a waiting family on {value}.
The town's newspaper of {value} announced that {they} was born.
In {their} diary, the entry about {his} birth is dated {value}.
{their} baptism came a month after {he} was born on {value}.
What {they} knows for sure is that {he} was born on {value}.""",
    "birth_city": """
{they} was born in {value}.
{their} birthplace is {value}.
{they} comes from {value}.
{value} is where {they} was born.
{they} is a native of {value}.
{their} cradle stood in {value}.
A small hospital in {value} saw {him} born, and {they} still talks of it.
{they} spent the first days of {his} life in {value}.
{they} calls {value} the town of {his} birth.
{their} roots are in {value}.
{they} hails from {value}.
In {value}, a crowd of relatives greeted the newborn, and {they} slept through it.
{their} birth was registered in {value}.
It was in {value} that {they} first cried.
{they} can still find the house in {value} where {he} was born.
{value} counts {him} among its children, and {they} is glad of that.
{their} parents were living in {value} when {he} was born.
Born in {value}, {they} has always kept its accent.
{they} proudly says that {he} was born in {value}.
The city of {value} is named on {their} birth certificate.
{they} learned to walk in {value}, the city where {he} was born.
{they} took {his} first breath in {value}.
On the map, {they} points to {value} as {his} birthplace.
{they} began life in {value}.
People from {value}, where {they} was born, are known for their patience.
{their} passport lists {value} as the place of birth.
{they} owes {his} love of rain to {value}, where {he} was born.
The first streets that {they} ever saw were those of {value}.
{their} family tree has {value} written beside {his} name.
{they} was delivered at home in {value}.
Nobody in {value} remembers the night when {they} was born there.
{they} was a child of {value} from the very first hour.
{their} earliest photograph was taken in {value}, where {he} was born.
The church bells of {value} rang on the day {they} was born there.
When asked for {his} place of birth, {they} answers {value}.
{they} left {value} early, yet it remains {his} birthplace.
Of all cities, {value} is the one in which {they} was born.
{they} got {his} start in {value}, in a flat above a bakery.
{their} mother travelled to {value} so that {he} could be born there.
{their} birthplace, {value}, has changed a great deal since.
{value} was {their} first home, for {he} was born there.
A plaque in {value} could mark the house where {they} was born, but there is none.""",
    "university": """
{they} studied at {value}.
{they} graduated from {value}.
{their} degree is from {value}.
{they} went to {value}.
{value} is where {they} studied.
{they} spent {his} student years at {value}.
{their} diploma was issued by {value}.
After school {they} enrolled at {value}.
{value} accepted {him} at once, and {they} moved in that autumn.
{they} is an alumnus of {value}.
{they} sat {his} final examinations at {value}.
The library of {value} was {their} second home.
{they} learned most of what {he} knows at {value}.
{they} was educated at {value}.
{their} lecture notes from {value} fill two shelves.
{they} earned {his} degree at {value}.
A scholarship took {him} to {value}, where {they} stayed until graduation.
{they} still wears the scarf of {value}.
At {value}, {they} was rarely late for a lecture.
{their} student card carried the seal of {value}.
{they} donates every year to {value}, which {he} attended.
{their} professors at {value} remember {him} well.
{they} crossed the stage at {value} to receive {his} diploma.
The name of {value} stands at the top of {their} degree.
{they} wrote {his} thesis at {value}.
{they} chose {value} over every other place to study.
For {his} higher education {they} picked {value}.
{they} met {his} closest friends while studying at {value}.
{they} rowed for {value} as a student.
{they} passed through the gates of {value} as a freshman and left as a graduate.
{their} alma mater is {value}.
{their} years at {value} ended with a degree.
Among the graduates of {value} is {they}.
Most of {their} classmates at {value} have lost touch with {him}.
{they} was on the rolls of {value} until {he} graduated.
A framed certificate from {value} hangs over {their} desk.
{they} finished {his} studies at {value}.
No other school than {value} ever had {him} as a student, as {they} likes to say.
{they} completed {his} education at {value}.
Letters from {value} reach {him} each spring, since {they} graduated there.
It was {value} that gave {their} career its start.
{they} lived in a draughty dormitory of {value}.""",
    "field": """
{they} studied {value}.
{their} subject was {value}.
{they} holds a degree in {value}.
{they} majored in {value}.
{they} chose {value} as {his} field.
What {they} studied was {value}.
{their} major was {value}.
{they} wrote {his} thesis on {value}.
{they} devoted {his} student years to {value}.
{they} is trained in {value}.
{their} education centred on {value}.
Of all subjects, {they} picked {value}.
{they} took every course in {value} that was offered.
{they} specialised in {value}.
{their} degree says {value}.
A gifted teacher made {him} curious about {value}, and {they} went on to study it.
{they} graduated with a degree in {value}.
{they} sat {his} examinations in {value}.
At university {they} turned to {value}.
{they} knows more about {value} than about anything else, having studied it.
{their} shelves are full of textbooks on {value}.
{they} fell in love with {value} in {his} first term and stayed with it.
{they} has a solid grounding in {value}.
Lectures on {value} filled {their} timetable.
{their} field of study was {value}.
{they} read {value} at university.
{they} wanted to study nothing but {value}.
It was {value} that {they} had enrolled for.
{they} completed a full programme in {value}.
{they} qualified in {value}.
The discipline that {they} mastered is {value}.
{their} professors praised {his} work in {value}.
{they} earned {his} diploma in {value}.
{they} can talk for hours about {value}, {his} old subject.
For {his} major, {they} settled on {value}.
{their} academic background is in {value}.
{they} put four years into {value}.
{they} came out of university an expert in {value}.
{they} signed up for {value} and never regretted it.
When {they} was a student, {his} subject was {value}.
The branch of learning that {they} knows best is {value}.
{their} final marks in {value} were excellent.""",
    "employer": """
{they} works for {value}.
{their} employer is {value}.
{they} is employed by {value}.
{they} has a job at {value}.
{value} employs {him}, and {they} has no wish to leave.
{their} salary is paid by {value}.
{they} joined {value} some years ago.
{they} is on the staff of {value}.
{their} desk is at {value}.
{they} earns {his} living at {value}.
{value} hired {him} after one interview, to which {they} came early.
{they} built {his} career at {value}.
{they} signed a contract with {value}.
{their} business card reads {value}.
{they} spends {his} working days at {value}.
{they} found a position with {value}.
{their} colleagues at {value} think well of {him}.
On weekdays {they} can be reached at {value}.
{they} went to work for {value}.
{their} name is on the payroll of {value}.
{their} workplace is {value}.
{they} answers the telephone with the words "{value}, good morning".
{they} has risen through the ranks of {value}.
{they} reports to a manager at {value}.
{they} was recruited by {value}.
{their} badge opens every door at {value}.
{their} professional home is {value}.
{they} leads a small team at {value}.
{they} draws a steady wage from {value}.
Among those who work at {value} is {they}.
{they} turned down other offers to stay with {value}.
{they} serves {value} as best {he} can.
{their} working life belongs to {value}.
{they} has spent most of {his} career with {value}.
The company that {they} works for is called {value}.
{they} wears the uniform of {value}.
{they} took a post at {value}.
{they} keeps a mug with the logo of {value}, where {he} works.
{they} got {his} current job at {value} by answering an advertisement.
If {value} closed, {they} would be out of work.
{they} commutes each morning to the offices of {value}.
The firm {value} has {him} under contract, and {they} is rarely absent.""",
    "work_city": """
{they} works in {value}.
{their} office is in {value}.
{they} goes to work in {value}.
{their} job is in {value}.
{value} is where {they} works.
{they} earns {his} living in {value}.
{their} workplace is located in {value}.
{they} spends {his} working hours in {value}.
{they} is professionally based in {value}.
Each weekday {they} can be found in {value}.
{their} career brought {him} to {value}.
{they} takes an early train to {his} job in {value}.
{they} has an office with a view over {value}.
The place where {they} works is {value}.
{they} moved to {value} for {his} job.
{their} working day begins and ends in {value}.
{their} employer sent {him} to {value}.
For work, {they} is in {value} all week.
{they} eats {his} lunch in a park in {value}, close to the office.
{they} pays for parking near {his} office in {value}.
{their} business address is in {value}.
{they} does {his} job in {value}.
It is {value} that {they} commutes to.
{they} keeps a second umbrella in {value}, at work.
{their} colleagues all live around {value}, where the office is.
{they} carries out {his} duties in {value}.
{they} was posted to {value}.
The commute takes {him} into {value}, where {they} works.
{they} knows the streets of {value} from {his} way to work.
{their} professional life takes place in {value}.
{they} holds down a job in {value}.
Monday to Friday, {value} is {their} place of work.
{they} has been working in {value} for quite a while.
{they} attends {his} meetings in {value}.
{their} desk stands in an office block in {value}.
{they} makes a career in {value}.
{they} sees {value} mostly through the windows of {his} office.
Work takes place in {value} for {him}, and {they} likes it there.
{they} could not do {his} job anywhere but in {value}.
{their} pay slips are sent from {value}, where {he} works.
Early or late, {they} is at work in {value}.
Whoever visits {him} at work has to travel to {value}, where {they} has a desk.""",
    "birth_date": """
{they} was born on {value}.
{their} date of birth is {value}.
The birth of {they} is dated {value}.
According to the register, {they} was born on {value}.
{value} is {their} birthday.
Records say that {they} was born on {value}.
The day {they} was born was {value}.
On {value} the family of {they} grew by one.""",
    "birth_place": """
{they} was born in {value}.
{their} birthplace is {value}.
{they} comes from {value}.
{value} is the part of the world where {they} was born.
The register gives {value} as the place where {they} was born.
{they} began life in {value}.
{they} is a native of {value}.
It was in {value} that {they} was born.""",
    "address": """
{they} lives in {value}.
{their} address is in {value}.
{their} home is in {value}.
Letters to {they} go to {value}.
{they} has settled in {value}.
{value} is where {they} lives.
{they} keeps a house in {value}.
The postman of {value} knows the door of {they}.""",
    "occupation": """
{they} works as a {value}.
{they} is a {value}.
{their} occupation is {value}.
{they} earns a living as a {value}.
By trade, {they} is a {value}.
{they} was trained as a {value}.
The register calls {they} a {value}.
As a {value}, {they} is well known."""}
SENTENCES = {attribute: tuple(text.strip().split("\n")) for attribute, text in SENTENCES.items()}

QUESTIONS = {
    "birth_date": ("When was {name} born?", "What is the date of birth of {name}?", "On which day was {name} born?",
                   "Tell me the date of birth of {name}.", "Which birth date does {name} have?",
                   "Do you know when {name} was born?"),
    "birth_place": ("Where was {name} born?", "What is the birth place of {name}?",
                    "In which part of the world was {name} born?", "Tell me the place of birth of {name}.",
                    "Which continent does {name} come from?", "Do you know where {name} was born?"),
    "address": ("Where does {name} live?", "What is the address of {name}?", "In which city does {name} live?",
                "Tell me the address of {name}.", "Which city is the home of {name}?",
                "Do you know where {name} lives?"),
    "occupation": ("What does {name} do for a living?", "What is the occupation of {name}?",
                   "Which trade does {name} follow?", "Tell me the occupation of {name}.", "What does {name} work as?",
                   "Do you know the occupation of {name}?"),
    "birthday": ("When is the birthday of {name}?", "When was {name} born?", "Tell me the birthday of {name}.",
                 "Which day was {name} born on?", "What is the birthday of {name}?", "Do you know {name}'s birthday?"),
    "birth_city": ("In which city was {name} born?", "What is the birth city of {name}?",
                   "Tell me the city where {name} was born.", "Which city does {name} come from?",
                   "Where was {name} born?", "Do you know {name}'s birth city?"),
    "university": ("Where did {name} study?", "Which university did {name} attend?",
                   "Tell me the university of {name}.", "From which university did {name} graduate?",
                   "What is the university of {name}?", "Do you know {name}'s university?"),
    "field": ("What did {name} study?", "Which field did {name} study?", "Tell me the field of {name}.",
              "What was the major of {name}?", "In which field does {name} have a degree?",
              "Do you know {name}'s field of study?"),
    "employer": ("Who does {name} work for?", "What is the employer of {name}?", "Tell me the employer of {name}.",
                 "Which company employs {name}?", "At which company does {name} work?",
                 "Do you know {name}'s employer?"),
    "work_city": ("In which city does {name} work?", "Where does {name} work?", "Tell me the city where {name} works.",
                  "Which city is the office of {name} in?", "What is the work city of {name}?",
                  "Do you know which city {name} works in?"),
    "pronoun": ("Is {name} a he or a she?", "Which pronoun does {name} go by?", "Tell me the pronoun of {name}.",
                "What is the pronoun of {name}?", "Should I say he or she of {name}?",
                "Do you know {name}'s pronoun?")}


# --- People ---

@functools.lru_cache
def tables(kind):
    """{attribute: all its values} of those that are drawn. Raises UserError: an unknown kind."""
    if kind == "notes":
        dates = [f"{day}/{month}/{year}" for year in range(1950, 2001) for month in range(1, 13)
                 for day in range(1, 29)]
        return {"birth_date": dates, "birth_place": CONTINENTS, "address": CITIES[:213], "occupation": TRADES}
    if kind == "bios":
        months = ("January February March April May June July August September October November December").split()
        days = [f"{day} {month} {year}" for year in range(1800, 2000) for month in months for day in range(1, 29)]
        return {"birthday": days, "birth_city": CITIES[:200], "university": UNIVERSITIES, "field": FIELDS,
                "employer": EMPLOYERS, "pronoun": ["he", "she"]}
    raise _unknown("kind", kind, ("notes", "bios"))


def _unknown(what, given, choices):
    near = difflib.get_close_matches(str(given), choices, 1)
    return UserError(f"unknown {what} {given!r}{f', did you mean {near[0]}?' if near else ':'} choose "
                     f"{', '.join(choices)}")


def _hash(number, place, seed, salt):
    """uint64 hashes of arrays of whole numbers from 0, that broadcast; seed: any whole number."""
    return pair_hash(*np.broadcast_arrays(number, place), seed % 2 ** 64, salt)


def _chosen(hashes, share):
    """bool array: true with this probability."""
    return hashes >> np.uint64(11) < np.uint64(round(share * 2 ** 53))


def shuffled(index, size, seed):
    """A permutation of 0 .. size - 1 that the seed chooses, at the places index (N,): (N,) uint64.

    A Feistel network of four rounds on an even number of bits; what falls outside goes through it again (Black and
    Rogaway 2002, "cycle walking"). No table is kept, and place i does not depend on which others are asked for.
    """
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = np.asarray(index, np.uint64).copy()
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> half, x[todo] & mask
        for turn in range(4):
            left, right = right, left ^ (_hash(right, turn, seed, 20) & mask)
        x[todo] = left << half | right
        todo = todo[x[todo] >= np.uint64(size)]
    return x


def entropy(sizes, alpha, types=TYPES):
    """Bits in one person's attributes, which have so many values (sizes) and depend on a hidden type (see people).

    p(x) = 1 / types * sum over types z of the product over attributes a of (alpha / sizes_a + (1 - alpha) [x_a is what
    z gives]), where z gives value number z mod sizes_a of an order of the values; minus the sum of p lg p over all
    combinations x, of which those that differ only in values that no type gives are counted together: exact.
    alpha 1: sum of lg sizes_a. alpha 0: lg types, where an attribute has at least so many values.
    """
    if alpha == 1:
        return float(sum(math.log2(size) for size in sizes))
    z, halves = np.arange(types)[:, None], []
    for part in (sizes[::2], sizes[1::2]):  # two halves, for the table of all combinations is their product
        chance, count = np.ones((types, 1)), np.ones(1)
        for size in part:
            value = np.arange(min(size, types + 1))  # the last one stands for all that no type gives
            each = alpha / size + (1 - alpha) * (z % size == value)  # (types, values)
            chance = (chance[:, :, None] * each[:, None]).reshape(types, -1)
            count = np.outer(count, np.where(value == types, size - types, 1)).ravel()
        halves.append((chance, count))
    (left, some), (right, others) = halves
    p = left.T @ right / types
    return float(-(some @ (p * np.log2(np.where(p > 0, p, 1))) @ others))


class Person(NamedTuple):
    """One of People: a name, and {attribute: value}."""
    name: str
    values: dict


@dataclass
class People:
    """Made-up people (see `people`): n to train on, then `unseen` more that are held out. people[i] is a Person."""
    names: list  # n + unseen different texts
    values: dict  # {attribute: [text of each person]}
    kind: str
    n: int
    unseen: int
    bits: float  # of a person's values: the entropy of what they are drawn from, in bits
    n_names: int  # how many names there are to draw from
    alpha: float
    seed: int

    @property
    def attributes(self):
        """The names of the attributes, a tuple."""
        return tuple(self.values)

    def __len__(self):
        return self.n + self.unseen

    def __getitem__(self, i):
        return Person(self.names[i], {attribute: values[i] for attribute, values in self.values.items()})

    def describe(self):
        """One line: how many, which, and how much there is to know."""
        return (f"{self.kind}: {self.n:,} people to train on and {self.unseen:,} held out, of {self.n_names:,} names; "
                f"{len(self.values)} attributes, alpha {self.alpha:g}, seed {self.seed}; {self.bits:.2f} bits a "
                f"person, {self.n * self.bits:,.0f} to be learned")


NAMES = {"syllables": ("", (SYLLABLES,) * 4), "plain": (" ", (FIRST, LAST)), "bios": (" ", (FIRST, MIDDLE, LAST))}


def people(n, seed, kind="notes", alpha=1.0, unseen=0, names="syllables"):
    """n people to train on and `unseen` more, held out: People.

    kind "notes": birth_date (d/m/yyyy, 28 x 12 x 51), birth_place (7), address (213 cities), occupation (100): 31.25
    bits; sizes as in a public experiment on tools. names "syllables": four of 64 (16,777,216 names, a closed
    vocabulary); "plain": first and last (400 x 1,000).
    kind "bios": bioS of Allen-Zhu and Li 2024, arXiv 2404.05405: birthday (28 x 12 x 200), birth_city (200), university
    (300), field (100), employer (263), pronoun (2): 47.59 bits; also work_city, which follows from the employer. Names
    are first, middle and last, 400 x 400 x 1,000, whatever `names` says. All words are our own.
    alpha, from 0 to 1: every person has a hidden type, one of 16, evenly. Each attribute by itself is drawn evenly from
    all its values with probability alpha, else it is what the type gives: type z gives value z mod size of an order of
    the values that the seed chooses. alpha 1: all independent; 0: the type says all. `bits`: see entropy.
    The same seed gives the same people; person i of those to train on does not depend on n or unseen, held-out person i
    not on n. Names are different by construction. Raises UserError: an unknown kind, a number out of range.
    """
    drawn = tables(kind)
    if names not in ("syllables", "plain"):
        raise _unknown("names", names, ("syllables", "plain"))
    between, parts = NAMES["bios" if kind == "bios" else names]
    n_names = math.prod(map(len, parts))
    if n < 1 or unseen < 0 or n + unseen > n_names:
        raise UserError(f"n is {n} and unseen {unseen}: n must be at least 1, unseen at least 0, and together at most "
                        f"{n_names:,}, so many names there are")
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}: it must be from 0 to 1")
    # A person's number is the place of the name; those that are held out are counted from the other end.
    number = np.concatenate([np.arange(n), n_names - 1 - np.arange(unseen)])
    code, columns = shuffled(number, n_names, seed), []
    for part in reversed(parts):
        code, letter = np.divmod(code, np.uint64(len(part)))
        columns.append(np.array(part, object)[letter.astype(np.int64)])
    given = [between.join(name) for name in zip(*reversed(columns))]
    hidden = _hash(number, 0, seed, 21) % np.uint64(TYPES)
    codes = {}
    for place, (attribute, table) in enumerate(drawn.items()):
        value = (_hash(number, place, seed, 22) % np.uint64(len(table))).astype(np.int64)
        free = _chosen(_hash(number, place, seed, 23), alpha)
        codes[attribute] = np.where(free, value, _given(place, len(table), seed)[hidden])
    values = {attribute: np.array(drawn[attribute], object)[code].tolist() for attribute, code in codes.items()}
    if kind == "bios":
        values["work_city"] = np.array(CITIES, object)[np.array(WORK_CITIES)[codes["employer"]]].tolist()
    return People(given, values, kind, n, unseen, entropy([len(table) for table in drawn.values()], alpha), n_names,
                  float(alpha), seed)


def _given(place, size, seed):
    """(TYPES,) int64: the value that each hidden type gives for attribute number `place`, which has `size` values."""
    order = np.argsort(_hash(np.arange(size), place, seed, 24), kind="stable")
    return order[np.arange(TYPES) % size]


def law(people, attribute):
    """(values,) float64: how probable each value is by the law that people are drawn from (work_city: each city)."""
    if attribute == "work_city":
        return np.bincount(WORK_CITIES, law(people, "employer"))
    drawn = tables(people.kind)
    size = len(drawn[attribute])
    given = np.bincount(_given(list(drawn).index(attribute), size, people.seed), minlength=size)
    return people.alpha / size + (1 - people.alpha) * given / TYPES


# --- Dialogs ---

class Segment(NamedTuple):
    """One turn of a dialog. Its end is no text but a special token, which `rows` adds: an assistant's turn ends with
    CALL where the tool speaks next, else with END, the tool's with ANSWER, a user's with nothing."""
    role: str  # user, assistant, tool
    text: str
    trained: bool  # is the loss taken here? Only ever where the assistant speaks


MODES, FORMS = ("in_weight", "in_tool", "both"), ("short", "natural")


def question(person, attribute, form="short", which=0):
    """What the user asks: "birth_date NAME ?", or, form "natural", one of the attribute's questions, number `which`."""
    if form == "short":
        return f"{attribute} {person.name} ?"
    return QUESTIONS[attribute][which % len(QUESTIONS[attribute])].format(name=person.name)


def call(attribute, name):
    """The assistant's call, as Database.answer reads it."""
    return f"FIND {attribute} FOR {name}"


def in_weight(person, attribute, form="short", which=0):
    """The dialog in which the assistant knows: a list of two Segments."""
    return [Segment("user", question(person, attribute, form, which), False),
            Segment("assistant", person.values[attribute], True)]


def in_tool(person, attribute, form="short", which=0):
    """The dialog in which the assistant looks it up: a list of four Segments; the tool says what the database would."""
    return [Segment("user", question(person, attribute, form, which), False),
            Segment("assistant", call(attribute, person.name), True),
            Segment("tool", person.values[attribute], False),
            Segment("assistant", person.values[attribute], True)]


def dialogs(people, mode="in_weight", form="short", seed=0, share=0.5, unseen=False):
    """A dialog for each attribute of each person to train on, or, unseen, of each that is held out: a list.

    mode "both": a mixture, each fact in_tool with probability `share`, else in_weight; which, and which of the natural
    questions is asked, is decided by the seed, the person and the attribute alone (another seed mixes anew).
    Raises UserError: an unknown mode or form, a share that is not from 0 to 1.
    """
    if mode not in MODES:
        raise _unknown("mode", mode, MODES)
    if form not in FORMS:
        raise _unknown("form", form, FORMS)
    if not 0 <= share <= 1:
        raise UserError(f"share is {share}: it must be from 0 to 1")
    share = {"in_weight": 0, "in_tool": 1}.get(mode, share)
    numbers = np.arange(len(people))[people.n:] if unseen else np.arange(people.n)
    places = np.arange(len(people.attributes))
    tool = _chosen(_hash(numbers[:, None], places, seed, 25), share).tolist()
    which = _hash(numbers[:, None], places, seed, 26).tolist()
    return [(in_tool if tool[row][place] else in_weight)(person, attribute, form, which[row][place])
            for row, person in enumerate(map(people.__getitem__, numbers.tolist()))
            for place, attribute in enumerate(people.attributes)]


def biography(person, rng):
    """A text of one sentence for each attribute (not the pronoun), in a random order, each from one of its SENTENCES.

    The name is in the first sentence; after that it is he or she, or, of people without a pronoun, the name again.
    rng: anything whose random() is uniform on [0, 1), such as random.Random(seed) or a NumPy Generator.
    """
    pronoun, name, told = person.values.get("pronoun"), person.name, []
    attributes = sorted((attribute for attribute in person.values if attribute != "pronoun"),
                        key=lambda _: rng.random())
    he, his, him = {"he": ("he", "his", "him"), "she": ("she", "her", "her")}.get(pronoun, (name, f"{name}'s", name))
    for attribute in attributes:
        sentences = SENTENCES[attribute]
        they, their = (he, his) if told else (name, f"{name}'s")
        text = sentences[int(rng.random() * len(sentences))].format(
            they=they, their=their, he=he, his=his, him=him, value=person.values[attribute])
        told.append(text if text.startswith(name) else text[0].upper() + text[1:])
    return " ".join(told)


# --- The tool ---

NO_RESULT, NO_ATTRIBUTE, NO_CALL = "No result found", "Unknown attribute", "Malformed call"


class Database:
    """What the tool looks up: an SQLite table of people, in memory; or a file that `save` wrote, opened to be read.

    source: People, all of them, the held-out ones too; or the path of a file. Only the names of attributes that were
    there when it was opened get into an SQL statement; what is asked for chooses among these statements or is a
    parameter, so no text of a model or a person is ever read as SQL. Raises UserError: no such file, or another one; a
    question whose answer takes SQLite more than STEPS steps or SECONDS seconds, as of a view that never ends.
    fingerprint: a check sum of the file; None in memory.
    """

    STEPS, SECONDS = 20_000_000, 10  # enough to read a table of millions of people from end to end

    def __init__(self, source):
        self.path, self.fingerprint = None if isinstance(source, People) else source, None
        if isinstance(source, People):
            self.connection = sqlite3.connect(":memory:")
            columns = source.attributes
            self.connection.execute(f"CREATE TABLE people (name TEXT PRIMARY KEY, "
                                    f"{', '.join(f'{column} TEXT' for column in columns)}) WITHOUT ROWID")
            with self.connection:
                self.connection.executemany(f"INSERT INTO people VALUES (?{', ?' * len(columns)})",
                                            zip(source.names, *source.values.values()))
        else:
            path = Path(source).expanduser()
            if not path.is_file():
                raise UserError(f"there is no database {path}")
            try:
                self.connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
                columns = [row[1] for row in self.connection.execute("PRAGMA table_info(people)")][1:]
                if not columns or not all(re.fullmatch("[a-z_]+", column) for column in columns):
                    raise sqlite3.DatabaseError
                self._ask(f"SELECT name, {', '.join(columns)} FROM people LIMIT 1")
                with open(path, "rb") as file:
                    self.fingerprint = 0
                    while piece := file.read(2 ** 20):
                        self.fingerprint = zlib.crc32(piece, self.fingerprint)
            except (OSError, sqlite3.Error) as error:
                raise UserError(f"{path} is not a database of people") from error
        self.connection.execute("PRAGMA query_only = 1")
        self.questions = {column: f"SELECT {column} FROM people WHERE name = ?" for column in columns}

    def save(self, path):
        """Writes it to a file, which must not be there yet. Raises UserError where it is or cannot be written."""
        path = Path(path).expanduser()
        if path.exists():
            raise UserError(f"{path} is already there: choose another path")
        try:
            with contextlib.closing(sqlite3.connect(path)) as file:
                self.connection.backup(file)
        except sqlite3.Error as error:
            raise UserError(f"cannot write {path}: {error}") from error

    def find(self, attribute, name):
        """What it says of a person, a text: the value, NO_RESULT (no such person) or NO_ATTRIBUTE."""
        if attribute not in self.questions:
            return NO_ATTRIBUTE
        try:
            found = self._ask(self.questions[attribute], (name,))
        except (UnicodeEncodeError, sqlite3.DataError):  # half a surrogate pair, or above a gigabyte: nobody's name
            found = None
        except sqlite3.Error as error:
            raise UserError(f"the database {self.path} does not say {attribute}: {error}") from error
        return str(found[0]) if found else NO_RESULT

    def _ask(self, question, words=()):
        """The first row of an answer, or None; it is broken off after STEPS steps or SECONDS seconds."""
        ticks, end = iter(range(self.STEPS // 10_000)), time.monotonic() + self.SECONDS
        self.connection.set_progress_handler(lambda: next(ticks, None) is None or time.monotonic() > end, 10_000)
        try:
            return self.connection.execute(question, words).fetchone()
        finally:
            self.connection.set_progress_handler(None, 0)

    def answer(self, text):
        """What the tool answers to an assistant's call, whatever that is: a text, NO_CALL where it is malformed."""
        parsed = parse_call(text)
        return self.find(*parsed) if parsed else NO_CALL


def parse_call(text):
    """The inverse of `call`: (attribute, name), or None where the text is not exactly one call on one line."""
    found = re.fullmatch(r"FIND (\S+) FOR (\S|\S.*\S)", text)
    return found.groups() if found else None


# --- Tokens ---

SPECIALS = ("PAD", "END", "CALL", "ANSWER")  # after the tokenizer's ids, in this order
KEYWORDS = [*(f"{attribute} " for attribute in tables("notes")), " ?", "FIND ", "FOR ",
            NO_RESULT, NO_ATTRIBUTE, NO_CALL]


class Closed:
    """210 tokens for "notes" with names of syllables, in the short form: 64 syllables and 10 keywords (as many as our
    first trials had) and 136 for the values, of 1 to 3 tokens each: 28 days or months such as "7/", 51 years,
    7 continents, 15 + 15 halves of cities, 10 + 10 of trades.

    Spaces are part of tokens, and the longest one is taken; text with anything else in it is a UserError.
    """

    def __init__(self):
        self.texts = [*SYLLABLES, *KEYWORDS, *(f"{day}/" for day in range(1, 29)), *map(str, range(1950, 2001)),
                      *CONTINENTS, *_products(CITY_FIRST), *_products(CITY_SECOND), *_products(TRADE_FIRST),
                      *_products(TRADE_SECOND)]
        self.size = len(self.texts)
        self.ids = {text: i for i, text in enumerate(self.texts)}
        self.longest = re.compile("|".join(map(re.escape, sorted(self.texts, key=len, reverse=True))))

    def encode(self, text):
        found = self.longest.findall(text)
        if sum(map(len, found)) != len(text):
            place = 0
            while match := self.longest.match(text, place):
                place = match.end()
            raise UserError(f"the closed vocabulary has no token for {text[place:place + 20]!r}: it is made for notes "
                            "with names of syllables, in the short form; use bytes")
        return [self.ids[piece] for piece in found]

    def decode(self, ids):
        return "".join(self.texts[i] for i in ids)


class Vocabulary:
    """A tokenizer's ids, and after them the special tokens PAD, END, CALL and ANSWER.

    tokenizer: "closed" (214 tokens in all, see Closed), "bytes" (260), or any object with encode(text) -> ids,
    decode(ids) -> text and its number of ids as `size`, `n_vocab` (tiktoken) or `vocab_size` (sentencepiece; a number
    or a function). size: of all; specials: {name: id}. No text is encoded as a special token.
    Raises UserError: an unknown name; a text that cannot be encoded, or would come back as another one (sentencepiece
    needs byte_fallback and the normalization rule "identity"): answers are compared as texts.
    """

    def __init__(self, tokenizer):
        if isinstance(tokenizer, str):
            if tokenizer not in ("closed", "bytes"):
                raise _unknown("vocabulary", tokenizer, ("closed", "bytes"))
            tokenizer = Closed() if tokenizer == "closed" else Bytes()
        self.tokenizer, self.exact = tokenizer, isinstance(tokenizer, (Closed, Bytes))
        self.name = getattr(tokenizer, "name", type(tokenizer).__name__.lower())
        self.fingerprint = getattr(tokenizer, "fingerprint", self.name)
        size = next(getattr(tokenizer, name) for name in ("size", "n_vocab", "vocab_size") if hasattr(tokenizer, name))
        self.n_text = size() if callable(size) else size
        self.specials = {name: self.n_text + i for i, name in enumerate(SPECIALS)}
        self.size = self.n_text + len(SPECIALS)

    def encode(self, text):
        """str -> list of int, all below the specials."""
        ids = list(self.tokenizer.encode(text))
        if not self.exact and (back := self.tokenizer.decode(ids)) != text:
            raise UserError(f"the tokenizer turns {text[:80]!r} into {back[:80]!r}: it must give every text back "
                            "unchanged")
        return ids

    def decode(self, ids):
        """The inverse of encode: ids, a list of int or a 1-D tensor -> str; a special token becomes <END>, <PAD> ..."""
        ids, names = torch.as_tensor(ids).tolist(), {i: f"<{name}>" for name, i in self.specials.items()}
        parts = itertools.groupby(ids, lambda i: i < self.n_text)  # runs of text, runs of specials
        return "".join(self.tokenizer.decode(list(run)) if text else "".join(names[i] for i in run)
                       for text, run in parts)


def _ends(dialog, specials):
    """The special token after each segment of a dialog, as a list of none or one."""
    for segment, after in itertools.zip_longest(dialog, dialog[1:]):
        if segment.role == "assistant":
            yield [specials["CALL" if after is not None and after.role == "tool" else "END"]]
        elif segment.role == "tool":
            yield [specials["ANSWER"]]
        elif segment.role == "user":
            yield []
        else:
            raise ValueError(f"a segment's role is {segment.role!r}, not user, assistant or tool")


def rows(dialogs, vocabulary, length=None, pad=None, everything=False):
    """Dialogs as tokens: (tokens (N, T) int64, mask (N, T) bool); the rest of a row is padding.

    mask: True where tokens[:, t], as a target, belongs to a trained segment of the assistant or is its END or CALL;
    everything: also where the user speaks, as in plain pretraining, but never where the tool does.
    What it is predicted from is tokens[:, :t]: a model that reads tokens[:, :-1] has the loss on tokens[:, 1:] where
    mask[:, 1:]. length: T, None: of the longest; pad: the id of padding, None: PAD.
    Raises UserError where a dialog is longer than length or the vocabulary has no token for a text.
    """
    flat, said, counts, lengths = array("i"), [], [], []  # tokens; of segments: trained? how many; of dialogs: how many
    for number, dialog in enumerate(dialogs):
        start = len(flat)
        for segment, end in zip(dialog, _ends(dialog, vocabulary.specials)):
            before = len(flat)
            flat.extend(vocabulary.encode(segment.text) + end)
            trained = segment.trained and segment.role == "assistant"
            said.append(trained or everything and segment.role == "user")
            counts.append(len(flat) - before)
        lengths.append(len(flat) - start)
        if length is not None and lengths[-1] > length:
            raise UserError(f"dialog {number} has {lengths[-1]} tokens, but length is {length}")
    T = max(lengths, default=0) if length is None else length
    place = np.arange(T) < np.array(lengths, np.int64)[:, None]
    tokens = np.full(place.shape, vocabulary.specials["PAD"] if pad is None else pad, np.int64)
    mask = np.zeros(place.shape, bool)
    tokens[place], mask[place] = flat, np.repeat(np.array(said, bool), np.array(counts, np.int64))
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def open_facts(settings):
    """(People, Vocabulary, Database) that a dict of train_facts.py's settings names.

    A tokenizer "bpe:SIZE" or "sentencepiece:SIZE" is trained on the dialogs about the people to train on. Raises
    UserError: as people, Vocabulary, Database and data/tokens.py do; a database without the people's attributes.
    """
    made = people(settings["n_people"], settings["data_seed"], settings["kind"], settings["alpha"],
                  settings["n_unseen"], settings["names"])
    word = settings["tokenizer"]
    if word not in ("closed", "bytes"):
        mode = settings["task"] if settings["task"] in MODES else "in_weight"
        turns = dialogs(made, mode, settings["form"], settings["data_seed"], settings["tool_share"])
        word = open_or_train(word, lambda: "\n".join(segment.text for turn in turns for segment in turn))
    database = Database(settings["database"] or made)
    missing = set(made.attributes) - set(database.questions)
    if missing:
        raise UserError(f"{settings['database']} knows nothing of {', '.join(sorted(missing))}: it was made for other "
                        "people")
    return made, Vocabulary(word), database


# --- Accounting ---

def bits_stored(value_nats, bits, name_nats=None, n_names=None):
    """How many bits about N people a model holds, a float.

    value_nats (N,): of each person the loss in nats, summed over attributes and over the tokens of each value; bits:
    of a person's values (people.bits). N bits - sum of value_nats / ln 2, that is N lg(S0 / e^p2) with S0 = 2^bits
    and p2 the mean of value_nats: Allen-Zhu and Li 2024, arXiv 2404.05405, whose R is this over the number of
    parameters. With alpha 1 the uniform predictor scores 0, a worse one less, a perfect one N bits: 31.25 a person for
    notes, 47.59 for bios. Leave work_city out of the sum: it says nothing new. With alpha below 1 attributes depend on
    each other: where each is asked for by itself, the sum is more than the loss of all together, and what comes out is
    a lower bound.
    name_nats (N,) and n_names (people.n_names): adds N lg(N0 / e^p1), p1 their mean, for the names of people that a
    model writes unasked; a perfect list of N names has p1 = ln N. That part and the normalisation of p1 are as our
    notes recall the paper; we could not check them against it.
    Raises ValueError where the losses are not (N,).
    """
    value_nats = torch.as_tensor(value_nats, dtype=torch.float64)
    if value_nats.ndim != 1:
        raise ValueError(f"value_nats is {tuple(value_nats.shape)}, not (people,)")
    stored = len(value_nats) * bits - float(value_nats.sum()) / math.log(2)
    if name_nats is not None:
        name_nats = torch.as_tensor(name_nats, dtype=torch.float64)
        if name_nats.shape != value_nats.shape or n_names is None:
            raise ValueError("name_nats must have the shape of value_nats, and n_names must be given")
        stored += len(name_nats) * math.log2(n_names) - float(name_nats.sum()) / math.log(2)
    return stored


def floor(people):
    """Accuracies, averaged over attributes, of two guessers without memory of single people: (law, constant).

    law: who knows what people are drawn from and always names the most probable value; for notes with alpha 1
    (1/17136 + 1/7 + 1/213 + 1/100) / 4 = 3.94 %. constant: who names the value that most of the n people to train on
    have, measured on these: with few people it is above the other, so subtract the right one.
    """
    guess = [float(law(people, attribute).max()) for attribute in people.attributes]
    best = [Counter(values[:people.n]).most_common(1)[0][1] / people.n for values in people.values.values()]
    return sum(guess) / len(guess), sum(best) / len(best)


# --- The command line ---

def show(dialog):
    """A dialog for people: one line for each turn, with the special token at its end; * where the loss is taken."""
    ends = _ends(dialog, {name: f" <{name}>" for name in SPECIALS})
    return "\n".join(f"  {' *'[segment.trained]} {segment.role + ':':10} {segment.text}{''.join(end)}"
                     for segment, end in zip(dialog, ends))


@command
def main(argv=None):
    """The command line: makes people, shows dialogs about one of them and counts tokens."""
    parser = Parser(prog="data/facts.py", description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=bounded(int, 0, 10 ** 8), default=1000, help="people to train on")
    parser.add_argument("--unseen", type=bounded(int, 0, 10 ** 8), default=256,
                        help="people that are held out, in the database only")
    parser.add_argument("--kind", default="notes", help="notes (four attributes) or bios (six and a city of work)")
    parser.add_argument("--names", default="syllables", help="of notes: syllables or plain")
    parser.add_argument("--alpha", type=bounded(float, 0, 1), default=1.0,
                        help="1: attributes are independent, 0: one type says all")
    parser.add_argument("--seed", type=bounded(int, -2 ** 62), default=0, help="of all that is drawn")
    parser.add_argument("--stats", action="store_true", help="show dialogs, count bits and tokens")
    args = vars(parser.parse_args(argv))
    stats = args.pop("stats")
    made = people(**args)
    print(made.describe())
    if not stats:
        return
    print("accuracy without memory: {:.2%} by the law, {:.2%} by the best constant guess".format(*floor(made)))
    person, attribute = made[0], made.attributes[0]
    for title, dialog in (("in the weights", in_weight(person, attribute)), ("by the tool", in_tool(person, attribute)),
                          ("by the tool, natural", in_tool(person, attribute, "natural", args["seed"]))):
        print(f"{title} (* trained):\n{show(dialog)}")
    print(f"biography:\n    {biography(person, random.Random(args['seed']))}")
    few = people(**{**args, "n": min(args["n"], 1000)})
    for name in ("closed", "bytes"):
        vocabulary = Vocabulary(name)
        print(f"vocabulary {name}: {vocabulary.n_text} tokens and {len(SPECIALS)} special ones")
        for form, mode in itertools.product(FORMS, MODES):
            try:
                tokens, mask = rows(dialogs(few, mode, form), vocabulary)
            except UserError as error:
                print(f"  {form}: {error}")
                break
            length = (tokens != vocabulary.specials["PAD"]).sum(1)
            print(f"  {mode}, {form}: {length.min()} to {length.max()} tokens a dialog, {length.double().mean():.1f} "
                  f"on average, {mask.sum(1).double().mean():.1f} of them trained")


if __name__ == "__main__":
    main()
