"""Time decoding, streaming and a conversation with a small instruct model, transformers in the same run; write a
Markdown table. README.md tells what is needed."""

from bench import BACKENDS, TRANSFORMERS, Bench, Row, parser


def table_rows(backends: list[str]) -> list[Row]:
    peer = (TRANSFORMERS, "torch")
    decode_target = {"jax": 2, "torch": 2}
    computed, first = "tokens computed for the first token, turn {}", "seconds to the first token, turn {}"
    names = [name for name in BACKENDS if name in backends]
    return [
        *(Row("decode", "one", "speed", "tokens/s", name, peer, decode_target.get(name), True) for name in names),
        *(Row("what `stream=True` costs", "stream", "cost", "%", name, None, 5) for name in names),
        *(
            Row(title.format(turn), "chat", f"{field}_{turn}", unit, name, peer)
            for turn in ("1", "2")
            for title, field, unit in ((computed, "computed", "tokens"), (first, "seconds", "s"))
            for name in names
        ),
        *(Row("tokens of turn 1 computed again in turn 2", "chat", "again", "tokens", name, peer, 0) for name in names),
        *(
            Row("`modelhub chat` to the first bytes of an answer", "command", "seconds", "s", name, None, 5)
            for name in names
        ),
    ]


def main() -> None:
    options = parser(__doc__, ("one", "stream", "chat", "command"), keras=False)
    options.add_argument("--preset", default="smollm2_135m_instruct_q4", help="for `modelhub chat`; in the cache")
    options.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    args = options.parse_args()
    Bench(args, models={"command": args.preset}, keeps_cache="command").report(table_rows(args.backends))


if __name__ == "__main__":
    main()
