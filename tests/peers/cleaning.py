#!/usr/bin/env python3
"""Captions cleaned by LlamaGen's own code, and the names of HTML's characters.

    cleaning.py LLAMAGEN     with a checkout of github.com/FoundationVision/LlamaGen

Writes tests/golden/captions/cleaned.json, the reference of `make test`, and plugins/engine/src/text/entities.txt. Needs a
separate virtual environment, with the versions that made the committed results, and Python 3.11:

    pip install ftfy==6.3.1 beautifulsoup4==4.15.0

A line of cleaned.json: a caption, the same after ftfy's repair, and the caption as the text encoder gets it. ftfy also guesses
which text was decoded in a wrong encoding, which retort does not; it guesses so for none of these captions.
"""

import argparse
import html.entities
import importlib.util
import json
import pathlib
import sys
from unittest import mock

import ftfy

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/captions/cleaned.json"
ENTITIES = ROOT / "plugins/engine/src/text/entities.txt"

CAPTIONS = [
    "A Bowl of  Red Apples, on a wooden table.",
    "\u201cSunset\u201d \u2014 over the (old) harbour\u2026 #3 of 12",
    "<b>Vintage</b> poster &amp; frame, 24x36 in: free shipping!",
    "see https://example.com/a/b for more",
    "photo by @someone at www.shop.com/cats - DSC_0041.jpg",
    "this-is-my-very-cute_cat",
    "cat dog&nbsp;&quot;bird&quot; &lt;3",
    "'a single quoted caption'",
    "IP 192.168.0.1 and id 1234567, jc6640 a1b2c3",
    "tea+cup%20saucer",
    "\u65e5\u672c tower \u2013 view ; 10:30 ",
    "click on link to download free PDF images, page 12",
    "***SALE*** 50% off!!! \"\"\"now\"\"\"",
    "a cat : a dog,a bird.A fish",
    "user@mail.com wrote",
    "L\u2019\u00e9t\u00e9 caf\u00e9 \u00bd price",
    "\\n hello \\n",
    "trailing dash -",
    ".hidden",
    # Normal forms: letters and their marks, Hangul, marks in the wrong order, characters that no normal form contains.
    "Cafe\u0301 cre\u0300me, jalapen\u0303o",
    "\u1112\u1161\u11ab \u1100\u1173\u11af",
    "a\u0323\u0307 and a\u0307\u0323 and z\u0327\u0301",
    "\u212b and \u2126 and \u212a",
    "\u0915\u093c and \u0958",
    "@cafe\u0301 in @zu\u0308rich",
    "\u0130stanbul and \u0049\u0307zmir",
    "\u039f\u0394\u039f\u03a3 and \u03a3",
    # Ligatures and letters of two characters.
    "\ufb01ne \ufb02owers, \ufb00 \ufb03 \ufb04 \ufb05 \ufb06",
    "\u0132sselmeer, \u0149 dag, \u01c4ep \u01c7ubav \u01cad \u01f1",
    "\u00e6on, \u0153uvre, stra\u00dfe, \u1e9e",
    # Widths.
    "\uff26\uff35\uff2c\uff2c\u3000\uff37\uff29\uff24\uff34\uff28 \uff11\uff12\uff13\uff01",
    "\uff8a\uff9d\uff76\uff78 \uff76\uff9e and \u30ab\u3099",
    "100\uff05 \uff5e \uffe5500 \uffe1 \uffe9 \uffda",
    "\uff06eacute\uff1b and \uff06lt\uff1bb\uff06gt\uff1b",
    "\uff06amp and \uff06#65\uff1b",
    "\uff08round\uff09 \uff3bsquare\uff3d \uff20home",
    "\uff02double\uff02 and \uff07single\uff07",
    # Quotes.
    "it\u02bcs \u201bso\u2019 \u201aor\u2018 so",
    "\u201edeutsch\u201c \u201fold\u201d \u00abfran\u00e7ais\u00bb \u2039one\u203a",
    "\u2032 and \u2033 and \u00b4 and `",
    # Line breaks and other white space.
    "one\r\ntwo\rthree\nfour",
    "one\u2028two\u2029three\u0085four",
    "a\u00a0b\u2009c\u202fd\u3000e\tf\u000bg\u000ch",
    "a . b\u001c.\u001db",
    "\u001f at 7:30 \u001f",
    "view at 7:30\u001c",
    "my\u001cphoto.jpg here",
    "   \n  ",
    "",
    # Control characters, joiners, directions.
    "a\u0007b\u0000c\u001bd\u007fe",
    "\ufeffbyte order\ufeff mark",
    "a\u206ab\u206fc\ufff9d\ufffbe\ufffcf",
    "zero\u200bwidth\u200cnon\u200djoiner\u2060word",
    "\u202eright to left\u202c and \u200e\u200f",
    "\u0093quoted\u0094 it\u0092s \u0085 \u0080 5",
    "\u001b[31mred\u001b[0m letters",
    # Emoji.
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family \u2764\ufe0f",
    "flag \U0001f1e9\U0001f1ea and \U0001f44d\U0001f3fd 1\ufe0f\u20e3",
    "\ufffd unknown \ufffd",
    # Words end before marks, and contain all numbers.
    "\u260e\ufe0f123456789 \u2764\ufe0fjpg \u2714\ufe0fpage 3",
    "cafe\u0301123456 x\u00b2123456 1234567\u00b2 \u2460page 4 \u24b6page 5",
    "\u0938\u0947 : \u0915\u093f,\u0915 \u0e19\u0e49.\u0e19",
    "\u0661\u0662\u0663\u0664\u0665\u0666 \u0967\u0968:\u0969\u096a",
    "\u0437\u0430\u0433\u0440\u0443\u0437\u043a\u0430 page 12 \u0430page 3 abc123\u0434 \u0434abc123",
    # References of HTML.
    "caf&eacute; na&iuml;ve &Uuml;ber &AElig;on &oslash; &aring;",
    "&hearts; &rarr; &infin; &notin; &fjlig; &nGt; &check; &star;",
    "&lsquo;single&rsquo; &ldquo;double&rdquo; &sbquo;low&bdquo; &laquo;angle&raquo;",
    "&#8217;s &#x2019;s &#39;s &#0; &#11; &#65 &#66",
    "&#145;&#146;&#147;&#148;&#150;&#151;&#133;&#128;",
    "&#xd800; &#x110000; &#99999999999; &#xfffe;",
    "&amp;eacute; &amp;amp;lt; &amp;#233;",
    "R&D and AT&T; Q&A",
    "salt&pepper &unknown; x&y",
    "r&d",
    "fish &chips",
    "caf&eacute",
    "caf&eacute. Caf&eacute-bar &eacute- x",
    "&frac12; &frac14; &times; &divide; 2&times;3 &deg;C &euro;5",
    "&nbsp;&nbsp;indented&ensp;text&emsp;&thinsp;&shy;",
    "&ampquot; &quot &quot;word&quot;",
    "&# 5 &#; 6 &#x; 7",
    "5 &lt; 6 &gt; 4 &lt;b&gt;bold&lt;/b&gt;",
    # Markup.
    "<a href='x>y' title=\"a > b\">link</a> text",
    "<p class=wide>one<br/>two</p><p>three</p>",
    "<!-- hidden --> shown <!-- also -- > hidden --> again",
    "<script>var x = '<b>';</script>after <style>p { color: red }</style>it",
    "<script>never closed",
    "a <3 b < c <= d > e",
    "a <b and c",
    "<!doctype html><html><body>text</body></html>",
    "<?xml version='1.0'?> data </> end </3",
    "an <unfinished tag",
    "a <person> and <PERSON>",
    # Addresses, names and numbers.
    "tea%20cup+and%2Bsaucer %C3%A9t%C3%A9 %zz %e9",
    "http://a.b/c?d=e&f=g www.example.org/path-to_it/ it.it",
    "mail me@example.com or @me_2 or #tag #12 #1234 #123456",
    "photo-of-a-very-small_dog_in_the-sun",
    "IMG_1234.JPG and a/b/c.png, \u00e9t\u00e9.jpeg",
    "Canon EF50mm f1.8 ii x100v dsc01234 a1b2c3d4 12ab34",
    "10x15 cm, 3.5\u00d74.5, 20\u044530, page 3, 12:30 12:30 ",
    "Worldwide Free Shipping! Free download free. Click here, click on it, click for more",
    "a - b \u2013 c \u2014 d \u2015 e \u2212 f \u301c g \u30a0 h",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e\u306e\u30bf\u30ef\u30fc \u3231 \u31f0",
    "...dots.. and . dot .hidden",
    "'quoted' \"twice\"",
    "__init__ _x_ -y- ,z:",
    "a,b/c.d 1,5 3.14 x.Y \u00e9,\u00e9",
]


def cleaning(checkout):
    """The function with which LlamaGen cleans captions."""
    # Its file also loads the text encoder, with packages that cleaning does not use.
    for name in ["torch", "transformers", "huggingface_hub"]:
        sys.modules.setdefault(name, mock.MagicMock())
    spec = importlib.util.spec_from_file_location("t5", checkout / "language/t5.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    embedder = module.T5Embedder.__new__(module.T5Embedder)
    embedder.use_text_preprocessing = True
    return embedder.text_preprocessing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=pathlib.Path, help="a checkout of FoundationVision/LlamaGen")
    clean = cleaning(parser.parse_args().checkout)
    lines = []
    for caption in CAPTIONS:
        repaired = ftfy.fix_text(caption)
        assert repaired == ftfy.fix_text(caption, fix_encoding=False), f"decoded again: {caption!a}"
        lines.append(json.dumps([caption, repaired, clean(caption)]))
    GOLDEN.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    names = sorted(html.entities.html5.items())
    codes = [(name, " ".join(f"{ord(c):x}" for c in characters)) for name, characters in names]
    ENTITIES.write_text("".join(f"{name} {code}\n" for name, code in codes))
    print(len(lines), "captions,", len(codes), "names")


if __name__ == "__main__":
    main()
