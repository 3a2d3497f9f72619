"""The closed word lists that the demo conversations are built from."""


def listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


NAMES = listed(
    "Alice Bob Carol David Emma Frank Grace Henry Iris Jack Kate Liam Mia Noah Olivia Paul "
    "Quinn Rosa Sam Tina Victor Wendy Yara Zoe Anna Ben Clara Daniel Eva Felix Hugo Julia Leo "
    "Maria Nina Oscar Peter Sara Tom Ada"
)
CITIES = listed(
    "Paris London Berlin Madrid Rome Vienna Tokyo Oslo Lima Cairo Delhi Boston Chicago Dublin "
    "Lisbon Prague Sydney Toronto Zurich Athens Geneva Seattle Austin Milan Munich Havana Kyoto "
    "Seoul Hanoi Moscow Denver Dallas Warsaw Porto Naples"
)
FRUITS = listed(
    "apple banana cherry date fig grape kiwi lemon mango melon orange papaya peach pear plum "
    "raspberry strawberry blueberry lime apricot coconut olive tomato"
)
ANIMALS = listed(
    "cat dog horse cow sheep goat pig rabbit mouse lion tiger bear wolf fox deer monkey elephant "
    "zebra camel eagle parrot duck goose turtle snake frog shark whale dolphin spider bee ant "
    "hamster penguin kangaroo"
)
COLORS = listed("red blue green yellow purple pink brown black white gray silver gold violet")
JOBS = listed(
    "teacher doctor nurse baker farmer pilot lawyer painter singer writer engineer driver "
    "gardener dentist chef carpenter waiter plumber"
)
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
ROOMS = listed("kitchen bedroom bathroom office garage garden hall cellar")
NOUNS = listed(
    "house river mountain table chair window door garden bottle paper pencil book letter music "
    "story summer winter spring autumn morning evening night water fire stone tree flower grass "
    "bread butter cheese sugar salt coffee tea milk egg rice soup car bus train plane boat bike "
    "road bridge city village school market museum park beach island forest desert ocean lake "
    "cloud rain snow wind storm star moon sun sky earth world hand foot head eye ear nose mouth "
    "heart friend family mother father sister brother baby king queen doctor clock lamp phone "
    "radio camera computer screen button key box bag coat shirt shoe hat ring mirror picture "
    "spoon fork knife plate cup glass pillow blanket basket ladder hammer rope wheel engine "
    "rocket planet signal number color shape circle square line point map ticket coin"
)
OTHERS = listed(
    "big small long short fast slow hot cold new old good happy sad quiet loud bright dark soft "
    "hard clean empty full heavy light round sharp sweet sour fresh warm cool deep wide run walk "
    "jump sing read write eat drink sleep play work build draw open close give take find keep "
    "one two three four five six seven eight nine ten hello world yes no again always never often "
    "today tomorrow yesterday here there under over between about alpha beta gamma delta the "
    "a of and to in is it on"
)
UNICODE = listed(
    "你好 世界 東京 日本 谢谢 再见 café naïve größer señor Привет мир ça été Ελλάδα שלום "
    "😀 🚀 🎉 🌍 ❤️ 👍🏽 🐍 ☕"
)

PLAIN = list(dict.fromkeys(NOUNS + OTHERS + FRUITS + ANIMALS + COLORS))
"""Lower-case words for repeating, reversing and counting letters."""

SORTABLE = list(dict.fromkeys(FRUITS + ANIMALS + COLORS))
"""Words whose alphabetical order the model learns."""

SPELLED = SORTABLE + NOUNS[:100] + ["hello", "world"]
"""Words whose letters the model learns."""

ALL = list(dict.fromkeys(PLAIN + NAMES + CITIES + JOBS + DAYS + ROOMS))
