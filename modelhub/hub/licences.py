"""Licences: the Hub's identifiers, and what some of them ask of those who pass a model on."""

import re
from dataclasses import dataclass
from typing import Any

LIST = "https://huggingface.co/docs/hub/repositories-licenses"
# The texts that licences want to go with every copy, as repositories call them.
FILES = re.compile(r"(LICEN[CS]E|USE_POLICY|NOTICE)[A-Za-z0-9_-]*(\.(txt|md))?")

# Of LIST; "unknown" and "other" are there too, and name no licence.
_IDENTIFIERS = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma
"""


@dataclass(frozen=True)
class Terms:
    """A licence that follows the weights. notice: what a NOTICE file must say, in its words. credit: to be displayed.
    name_begins: how the name of a derived model must begin. restrictions: what users are bound to, as Markdown."""

    licence: str
    name: str
    url: str
    restrictions: str
    notice: str
    bases: str  # the repositories that are under it, a pattern
    credit: str | None = None
    name_begins: str | None = None


def _llama(version: str, credit: str | None, name_begins: str | None, folder: str) -> Terms:
    meta = "Meta " if version == "3" else ""
    named = "LLAMA 2 Community License, Copyright (c)" if version == "2" else None
    return Terms(
        licence=f"llama{version}",
        name=f"{meta}Llama {version} Community License",
        url=f"{folder}license/",
        restrictions=f"its [Acceptable Use Policy]({folder}use-policy/)",
        notice=f"{meta}Llama {version} is licensed under the "
        f"{named or f'{meta}Llama {version} Community License, Copyright ©'} Meta Platforms, Inc. All Rights Reserved.",
        bases=rf"(meta-llama|keras)/(meta-)?llama-?{re.escape(version)}(?![.\d])",
        credit=credit,
        name_begins=name_begins,
    )


_META = "https://www.llama.com/"
_GEMMA = "https://ai.google.dev/gemma/"
_HEALTH = "https://developers.google.com/health-ai-developer-foundations/"
# As of Gemma's terms, section 3.1, and section 1.b of the Llama licences.
_TERMS = (
    Terms(
        licence="gemma",
        name="Gemma Terms of Use",
        url=f"{_GEMMA}terms",
        restrictions=f"section 3.2 and the [Gemma Prohibited Use Policy]({_GEMMA}prohibited_use_policy)",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        bases=r"(google|keras)/((code|embedding|function|recurrent|shield|translate|vault)[_-]?)?gemma(?![_-]?4(?!b))",
    ),
    Terms(
        licence="health-ai-developer-foundations",
        name="Health AI Developer Foundations Terms of Use",
        url=f"{_HEALTH}terms",
        restrictions=f"section 3.2 and the [Prohibited Use Policy]({_HEALTH}prohibited-use-policy)",
        notice=f"HAI-DEF is provided under and subject to the Health AI Developer Foundations Terms of Use found at "
        f"{_HEALTH}terms",
        bases=r"(google|keras)/medgemma",
    ),
    _llama("2", None, None, "https://ai.meta.com/llama/"),
    _llama("3", "Built with Meta Llama 3", "Llama 3", f"{_META}llama3/"),
    _llama("3.1", "Built with Llama", "Llama", f"{_META}llama3_1/"),
    _llama("3.2", "Built with Llama", "Llama", f"{_META}llama3_2/"),
    _llama("3.3", "Built with Llama", "Llama", f"{_META}llama3_3/"),
    _llama("4", "Built with Llama", "Llama", f"{_META}llama4/"),
)


def terms_of(licence: str | None, *sources: str | None) -> Terms | None:
    """The terms that a model is under, by where it comes from, else by its licence; None where nothing is asked.

    sources: addresses and repositories. They go first: another licence for what is new does not lift the terms.
    """
    named = next((terms for terms in _TERMS if licence and terms.licence == licence.lower()), None)
    found = [
        terms for terms in _TERMS if any(source and re.search(terms.bases, source, re.IGNORECASE) for source in sources)
    ]
    if not found or named in found:
        return named
    return found[-1]  # Kaggle keeps llama3.2_1b in a folder llama3: what comes later is the more exact


def front_matter(licence: str) -> dict[str, Any]:
    """The keys of a card that say it: license, and license_name where the Hub does not know the identifier."""
    name = re.sub(r"[^a-z0-9.+]+", "-", licence[:1000].lower()).strip("-.")[:64]
    if name in (*_IDENTIFIERS.split(), "unknown", "other"):
        return {"license": name}
    return {"license": "other", "license_name": name} if name else {}
