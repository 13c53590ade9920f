#!/usr/bin/env python3
"""An implementation of envelope format 1 that shares no code with the plugin, and the source of the golden vectors.

The vectors were written before the plugin sealed its first envelope. They never change; new ones may be added.
`make.py --check` (needs PyPI's `cryptography`) makes them again and compares.
"""
import hashlib, hmac, json, pathlib, sys
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_wrap, aes_key_wrap_with_padding

HERE = pathlib.Path(__file__).parent


def sha16(*parts):
    return hashlib.sha256(b"\0".join(parts)).digest()[:16]


def identity(provider, name):
    return sha16(b"trousseau kek v1", provider, name)


def key_set(cluster, identities):
    return sha16(b"trousseau key set v1", cluster, b"".join(sorted(identities)))


def hkdf_sha256(secret, info, length):
    """RFC 5869 with no salt (32 zero bytes)."""
    prk = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    out, block, counter = b"", b"", 1
    while len(out) < length:
        block = hmac.new(prk, block + info + bytes([counter]), hashlib.sha256).digest()
        out, counter = out + block, counter + 1
    return out[:length]


def header(keys, recipients, fmt=1, suite=1, count=None):
    out = bytes([fmt, suite]) + keys + bytes([len(recipients) if count is None else count])
    for ident, algorithm, wrapped in recipients:
        out += ident + bytes([algorithm]) + len(wrapped).to_bytes(2, "big") + wrapped
    return out


def seal(dek, nonce, head, plaintext):
    okm = hkdf_sha256(dek, b"trousseau envelope v1\0" + head, 64)
    aad = head + okm[32:]
    return aad + nonce + AESGCM(okm[:32]).encrypt(nonce, plaintext, aad)


def pattern(start, length):
    return bytes((start + i) % 256 for i in range(length))


KEK_A, KEK_B, KEK_C = pattern(0x00, 32), pattern(0x80, 32), pattern(0x40, 32)
ID_A = identity(b"pkcs11", bytes.fromhex("019aaf2c4c007a1b8c2d3e4f50617283"))
ID_B = identity(b"pkcs11", bytes.fromhex("019b49a8c8007e5f9a0b1c2d3e4f5061"))
ID_C = identity(b"pkcs11", bytes.fromhex("019be4264400734a8b5c6d7e8f901a2b"))
DEK, NONCE, SEED = pattern(0x10, 32), pattern(0xA0, 12), pattern(0xC0, 32)
SET_A, SET_AB = key_set(b"prod-1", [ID_A]), key_set(b"prod-1", [ID_A, ID_B])
KW_A = (ID_A, 1, aes_key_wrap(KEK_A, DEK))
IV_B = pattern(0x50, 12)
GCM_B = (ID_B, 3, IV_B + AESGCM(KEK_B).encrypt(IV_B, DEK, ID_B))
BOTH = sorted([KW_A, GCM_B])
SET_C, SET_ABC = key_set(b"prod-1", [ID_C]), key_set(b"prod-1", [ID_A, ID_B, ID_C])
KWP_C = (ID_C, 2, aes_key_wrap_with_padding(KEK_C, DEK))


def transit_name(key, version, created):
    """Key name, version, and the second of Unix time at which that version was made: each behind its u16 length."""
    parts = [key.encode(), str(version).encode(), str(created).encode()]
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


ID_T = identity(b"transit", transit_name("trousseau", 12, 1795469831))
# What Transit answers behind `vault:v12:`, decoded: 12 bytes of nonce, ciphertext, 16 bytes of tag. The associated data are
# the identity.
IV_T = pattern(0x60, 12)
TRANSIT_T = (ID_T, 5, IV_T + AESGCM(KEK_C).encrypt(IV_T, DEK, ID_T))
SET_AT = key_set(b"prod-1", [ID_A, ID_T])


def good():
    for name, keys, recipients, plaintext in [
        ("one recipient, AES-KW, a 32-byte seed", SET_A, [KW_A], SEED),
        ("one recipient, AES-GCM, a 32-byte seed", sha16(b"trousseau key set v1", b"prod-1", ID_B), [GCM_B], SEED),
        ("two recipients", SET_AB, BOTH, SEED),
        ("the key set names two KEKs, one was out of reach", SET_AB, [KW_A], SEED),
        ("one byte", SET_A, [KW_A], b"\x00"),
        ("v1beta1's health check", SET_A, [KW_A], b"ping"),
        ("one recipient, AES-KWP, a 32-byte seed", SET_C, [KWP_C], SEED),
        ("three recipients, each with another algorithm", SET_ABC, sorted([KW_A, GCM_B, KWP_C]), SEED),
        ("a token and Transit, a 32-byte seed", SET_AT, sorted([KW_A, TRANSIT_T]), SEED),
    ]:
        yield dict(name=name, dek=DEK, nonce=NONCE, key_set=keys, plaintext=plaintext,
                   recipients=[dict(identity=i, algorithm=a, wrapped=w) for i, a, w in recipients],
                   envelope=seal(DEK, NONCE, header(keys, recipients), plaintext))


def bad():
    """`refused` says where: `parse` is before any token call, `open` is after the DEK was unwrapped."""
    head = header(SET_A, [KW_A])
    whole = seal(DEK, NONCE, head, SEED)
    flip = lambda at: whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
    other = lambda **kw: seal(DEK, NONCE, header(SET_A, kw.pop("recipients", [KW_A]), **kw), SEED)
    yield "empty", "parse", b""
    yield "format 0", "parse", other(fmt=0)
    yield "format 2", "parse", other(fmt=2)
    yield "suite 0", "parse", other(suite=0)
    yield "suite 2", "parse", other(suite=2)
    yield "no recipient", "parse", other(recipients=[])
    yield "nine recipients", "parse", other(recipients=[(bytes([i]) * 16, 1, KW_A[2]) for i in range(9)])
    yield "recipients in descending order", "parse", seal(DEK, NONCE, header(SET_AB, BOTH[::-1]), SEED)
    yield "the same recipient twice", "parse", seal(DEK, NONCE, header(SET_A, [KW_A, KW_A]), SEED)
    yield "fewer recipients than counted", "parse", other(count=2)
    yield "algorithm 0", "parse", other(recipients=[(ID_A, 0, KW_A[2])])
    yield "algorithm 255", "parse", other(recipients=[(ID_A, 255, KW_A[2])])
    yield "wrapped DEK one block short", "parse", other(recipients=[(ID_A, 1, KW_A[2][:32])])
    yield "wrapped DEK of no bytes", "parse", other(recipients=[(ID_A, 1, b"")])
    yield "wrapped DEK too long for its algorithm", "parse", other(recipients=[(ID_A, 1, GCM_B[2])])
    yield "wrapped length past the end", "parse", head[:36] + b"\xff\xff" + head[38:]
    yield "ends inside the identity", "parse", whole[:25]
    yield "ends inside the commitment", "parse", whole[: len(head) + 31]
    yield "ends inside the nonce", "parse", whole[: len(head) + 32 + 11]
    yield "nothing between nonce and tag", "parse", whole[: len(head) + 32 + 12 + 16]
    yield "key set changed", "open", flip(2)
    yield "recipient's identity changed", "open", flip(19)
    yield "wrapped DEK changed, DEK known all the same", "open", flip(40)
    yield "commitment changed", "open", flip(len(head))
    yield "nonce changed", "open", flip(len(head) + 32)
    yield "ciphertext changed", "open", flip(len(head) + 32 + 12)
    yield "tag changed", "open", flip(len(whole) - 1)
    yield "last byte missing", "open", whole[:-1]
    yield "one trailing byte", "open", whole + b"\0"
    yield "wrapped DEK of AES-KWP one block short", "parse", seal(DEK, NONCE, header(SET_C, [(ID_C, 2, KWP_C[2][:32])]), SEED)
    yield "wrapped DEK of AES-KWP one block long", "parse", seal(DEK, NONCE, header(SET_C, [(ID_C, 2, KWP_C[2] + bytes(8))]), SEED)
    kwp = seal(DEK, NONCE, header(SET_C, [KWP_C]), SEED)
    yield "AES-KWP named AES-KW", "open", kwp[:35] + b"\x01" + kwp[36:]
    yield "sealed under another DEK", "open", seal(pattern(0x11, 32), NONCE, head, SEED)
    yield "wrapped DEK of Transit one byte short", "parse", other(recipients=[(ID_T, 5, TRANSIT_T[2][:-1])])
    yield "wrapped DEK of Transit as text", "parse", other(recipients=[(ID_T, 5, b"vault:v12:" + TRANSIT_T[2])])


def names():
    for cka_id in ["019aaf2c4c007a1b8c2d3e4f50617283", "019b49a8c8007e5f9a0b1c2d3e4f5061", "01", "6b656b"]:
        raw = bytes.fromhex(cka_id)
        yield dict(provider="pkcs11", name=raw, identity=identity(b"pkcs11", raw))
    for key, version, created in [("trousseau", 1, 1795469831), ("trousseau", 12, 1795469831), ("t", 1, 0)]:
        raw = transit_name(key, version, created)
        yield dict(provider="transit", key=key, version=version, created=created, name=raw, identity=identity(b"transit", raw))


def key_sets():
    for cluster, ids in [("prod-1", [ID_A]), ("prod-2", [ID_A]), ("prod-1", [ID_A, ID_B]), ("prod-1", [ID_B, ID_A])]:
        digest = key_set(cluster.encode(), ids)
        yield dict(cluster=cluster, identities=ids, key_set=digest, key_id="tr1-" + digest.hex())


def vectors():
    return {
        "envelope-1.json": dict(good=list(good()), bad=[
            dict(name=n, refused=r, dek=DEK, envelope=e) for n, r, e in bad()]),
        "identity-1.json": dict(identities=list(names()), key_sets=list(key_sets())),
    }


def main():
    for name, content in vectors().items():
        text = json.dumps(content, indent=1, default=bytes.hex) + "\n"
        path = HERE / name
        if "--check" not in sys.argv:
            path.write_text(text)
        elif path.read_text() != text:
            sys.exit(f"{path} is not what this implementation makes")


main()
