"""Two small general abilities, as multiple choice: what a model knew before it was fine-tuned."""

from __future__ import annotations

import random
from typing import Any

_CAPITALS = """France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Austria:Vienna
Switzerland:Bern Belgium:Brussels Netherlands:Amsterdam Denmark:Copenhagen Norway:Oslo
Sweden:Stockholm Finland:Helsinki Iceland:Reykjavik Ireland:Dublin Poland:Warsaw Hungary:Budapest
Romania:Bucharest Bulgaria:Sofia Greece:Athens Turkey:Ankara Russia:Moscow Ukraine:Kyiv
Serbia:Belgrade Croatia:Zagreb Slovenia:Ljubljana Slovakia:Bratislava Estonia:Tallinn Latvia:Riga
Lithuania:Vilnius Belarus:Minsk Albania:Tirana Cyprus:Nicosia Malta:Valletta Georgia:Tbilisi
Armenia:Yerevan Azerbaijan:Baku Israel:Jerusalem Lebanon:Beirut Syria:Damascus Jordan:Amman
Iraq:Baghdad Iran:Tehran Egypt:Cairo Libya:Tripoli Tunisia:Tunis Algeria:Algiers Morocco:Rabat
Senegal:Dakar Ghana:Accra Nigeria:Abuja Kenya:Nairobi Uganda:Kampala Rwanda:Kigali Zambia:Lusaka
Zimbabwe:Harare Angola:Luanda Mozambique:Maputo Ethiopia:Addis_Ababa Sudan:Khartoum
Somalia:Mogadishu Afghanistan:Kabul Pakistan:Islamabad India:New_Delhi Nepal:Kathmandu
Bangladesh:Dhaka Bhutan:Thimphu Thailand:Bangkok Vietnam:Hanoi Cambodia:Phnom_Penh Laos:Vientiane
Philippines:Manila China:Beijing Japan:Tokyo Mongolia:Ulaanbaatar Australia:Canberra
New_Zealand:Wellington Fiji:Suva Canada:Ottawa Mexico:Mexico_City Cuba:Havana Jamaica:Kingston
Haiti:Port-au-Prince Guatemala:Guatemala_City Honduras:Tegucigalpa Nicaragua:Managua
Costa_Rica:San_José Panama:Panama_City Colombia:Bogotá Venezuela:Caracas Ecuador:Quito Peru:Lima
Chile:Santiago Argentina:Buenos_Aires Uruguay:Montevideo Paraguay:Asunción Brazil:Brasília
Qatar:Doha Oman:Muscat Yemen:Sanaa Namibia:Windhoek Botswana:Gaborone Madagascar:Antananarivo"""
_OPPOSITES = """hot:cold big:small fast:slow early:late open:closed light:dark old:young rich:poor
strong:weak high:low long:short wide:narrow thick:thin deep:shallow heavy:light hard:soft
rough:smooth wet:dry clean:dirty full:empty loud:quiet near:far good:bad right:wrong true:false
happy:sad brave:afraid polite:rude safe:dangerous cheap:expensive easy:difficult simple:complex
sweet:bitter sharp:blunt tight:loose public:private ancient:modern alive:dead asleep:awake
first:last inside:outside above:below before:after always:never all:none many:few more:less
north:south east:west left:right up:down in:out on:off push:pull give:take buy:sell win:lose
begin:end start:stop arrive:depart enter:leave accept:refuse attack:defend build:destroy
borrow:lend love:hate laugh:cry remember:forget rise:fall increase:decrease expand:contract
include:exclude import:export send:receive float:sink melt:freeze succeed:fail teach:learn
question:answer friend:enemy day:night summer:winter heaven:hell war:peace birth:death king:queen
husband:wife uncle:aunt male:female parent:child front:back top:bottom victory:defeat
profit:loss truth:lie freedom:slavery optimist:pessimist maximum:minimum positive:negative
noisy:silent visible:hidden guilty:innocent solid:liquid"""
#: The question of each ability, and its pairs of asked and answer.
ABILITIES = {
    "capitals": ("The capital of {} is", _CAPITALS),
    "opposites": ("The opposite of {} is", _OPPOSITES),
}
_OPTIONS = 4


def questions(ability: str, *, seed: int, count: int = 60) -> list[dict[str, Any]]:
    """Rows ``{"prompt", "options", "answer"}``; wrong options are answers to other questions."""
    sentence, written = ABILITIES[ability]
    pairs = [pair.replace("_", " ").split(":") for pair in written.split()]
    rng, rows = random.Random(seed), []
    for asked, right in pairs:
        wrong = [answer for _, answer in pairs if answer not in (asked, right)]
        options = rng.sample(list(dict.fromkeys(wrong)), _OPTIONS - 1)
        place = rng.randrange(_OPTIONS)
        options.insert(place, right)
        prompt = sentence.format(asked)
        rows.append({"prompt": prompt, "options": [f" {o}" for o in options], "answer": place})
    return rng.sample(rows, min(count, len(rows)))
