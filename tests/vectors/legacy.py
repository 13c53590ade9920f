#!/usr/bin/env python3
"""What older plugins wrote, by an implementation that shares no code with ours: the source of legacy-1.json.

Each writer below follows its plugin's source, which is named. `legacy.py --check` makes the file again and compares.
"""
import base64, json, pathlib, sys

PATH = pathlib.Path(__file__).parent / "legacy-1.json"


def b64(raw):
    return base64.b64encode(raw)  # Go's base64.StdEncoding


def transit(version, body=bytes(range(12 + 32 + 16))):
    """Transit's answer for 32 bytes under aes256-gcm96: 12 bytes of nonce, 32 of ciphertext, 16 of tag."""
    return b"vault:v%d:%s" % (version, b64(body))


def trousseau_1(answer):
    return answer  # ondat/trousseau v1.1.3: internal/server/grpc.go, Encrypt


def trousseau_2(answer):
    return b64(answer)  # v2.0.0-alpha.3: providers/vault/pkg/vault/vault.go, encryptLocked


def proxy(*lines):
    return b"".join(b"%s:-:%s\n" % line for line in lines)  # v2.0.0-alpha.3: trousseau/pkg/server/grpc.go, Encrypt


BARE = ["trousseau-v1", "vault-kubernetes-kms"]
RSA_4096 = bytes(i % 256 for i in range(512))
AWS = (b"awskms", b64(b"\x01\x02\x02\x00x" + bytes(60)))


def good():
    for version in [1, 9, 10, 63, 4294967295]:
        yield f"Trousseau 1, version {version}", BARE, trousseau_1(transit(version)), version, transit(version)
    yield "an RSA key of 4096 bits", BARE, transit(2, RSA_4096), 2, transit(2, RSA_4096)
    yield "the health check's four bytes", BARE, transit(1, bytes(32)), 1, transit(1, bytes(32))
    yield "version 0, which Transit takes for 1", BARE, b"vault:v0" + transit(1)[8:], 1, transit(1)
    yield "Trousseau 2, its provider", ["trousseau-v2"], trousseau_2(transit(63)), 63, transit(63)
    yield "Trousseau 2, its proxy", ["trousseau-v2-proxy"], proxy((b"vault", trousseau_2(transit(63)))), 63, transit(63)
    vault = (b"vault", trousseau_2(transit(7)))
    yield "a line of another provider before", ["trousseau-v2-proxy"], proxy(AWS, vault), 7, transit(7)
    yield "a line of another provider after", ["trousseau-v2-proxy"], proxy(vault, AWS), 7, transit(7)


def bad():
    """Name, a part of the reason, bytes."""
    whole, text = transit(63), trousseau_2(transit(63))
    yield "empty", "it is empty", b""
    yield "empty from the provider, in a proxy's line", "it is empty", proxy((b"vault", b""))
    yield "lines, none of vault", "none is of its provider vault", proxy(AWS)
    yield "a provider whose name ends in vault", "none is of its provider vault", proxy((b"myvault", text))
    yield "two lines of vault", "more than one", proxy((b"vault", text), (b"vault", text))
    yield "two lines of vault, one empty", "more than one", proxy((b"vault", b""), (b"vault", text))
    yield "no line feed at the end", "has no end", proxy((b"vault", text))[:-1]
    yield "an empty line", "without `:-:`", proxy((b"vault", text)) + b"\n"
    yield "a raw ciphertext in a proxy's line", "not base64", proxy((b"vault", whole))
    yield "two separators in a line", "not base64", proxy((b"vault", b"vault:-:" + text))
    yield "an envelope", "not base64", bytes([1, 1]) + bytes(200)
    yield "base64 of something else", "begins with `vault:v`", b64(bytes(60))
    yield "base64 twice", "begins with `vault:v`", b64(text)
    yield "base64 without its padding", "not base64", b64(transit(1)[:-1] + b"=").rstrip(b"=") + b"\n"
    yield "a line feed behind it", "not base64", whole + b"\n"
    yield "a space before it", "not base64", b" " + whole
    yield "no version", "is not a number", whole.replace(b"63", b"")
    yield "a leading zero", "is not a number", whole.replace(b"63", b"063")
    yield "zero twice", "is not a number", whole.replace(b"63", b"00")
    yield "a signed version", "is not a number", whole.replace(b"63", b"+63")
    yield "a version past 32 bits", "is not a number", whole.replace(b"63", b"4294967296")
    yield "a hexadecimal version", "is not a number", whole.replace(b"63", b"3f")
    yield "an Arabic digit", "is not a number", whole.replace(b"63", "٦".encode())
    yield "nothing behind the version", "nothing follows", b"vault:v1"
    yield "an empty body", "shorter", b"vault:v1:"
    yield "a body one byte short", "shorter", transit(1, bytes(28))
    yield "a body in the URL's alphabet", "not base64", b"vault:v1:" + base64.urlsafe_b64encode(b"\xff" * 60)
    yield "a body whose last bits are not zero", "not base64", b"vault:v1:" + b64(bytes(61))[:-3] + b"B=="
    yield "a third part, a signature's", "not base64", whole + b":" + b64(bytes(60))
    yield "longer than a DEK makes it", "longer", transit(1, bytes(800))
    yield "another prefix", "not base64", b"hashi:v1:" + b64(bytes(60))
    yield "capitals", "not base64", whole.replace(b"vault", b"VAULT")
    yield "no UTF-8", "not base64", b"\xff" + whole


def main():
    content = dict(
        good=[dict(name=n, formats=f, stored=s.hex(), version=v, ciphertext=c.decode()) for n, f, s, v, c in good()],
        bad=[dict(name=n, refused=r, stored=s.hex()) for n, r, s in bad()],
    )
    text = json.dumps(content, indent=1) + "\n"
    if "--check" not in sys.argv:
        PATH.write_text(text)
    elif PATH.read_text() != text:
        sys.exit(f"{PATH} is not what this implementation makes")


main()
