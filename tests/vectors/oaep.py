#!/usr/bin/env python3
"""Wrap algorithm 4, RSA-OAEP signed, by an implementation that shares no code with the plugin: integers and hashes only.

It is the source of oaep-1.json, which never changes; `oaep.py --check` makes it again and compares.
"""
import hashlib, json, pathlib, sys

PATH = pathlib.Path(__file__).parent / "oaep-1.json"
E = 65537
CKA_ID = bytes.fromhex("019aaf2c4c007a1b8c2d3e4f50617283")
DEK = bytes(range(0x10, 0x30))


def sha256(data):
    return hashlib.sha256(data).digest()


def stream(seed, length):
    return b"".join(sha256(seed + i.to_bytes(4, "big")) for i in range(length // 32 + 1))[:length]


def is_prime(n):
    """Miller-Rabin to fixed bases, on top of a few small divisors: enough for keys that guard nothing."""
    if any(n % p == 0 for p in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)):
        return False
    d, s = n - 1, 0
    while d % 2 == 0:
        d, s = d // 2, s + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29):
        x = pow(base, d, n)
        if x in (1, n - 1):
            continue
        for _ in range(s - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def prime(name, bits):
    candidate = int.from_bytes(stream(name, bits // 8), "big") | 3 << bits - 2 | 1
    while candidate % E == 1 or not is_prime(candidate):
        candidate += 2
    return candidate


class Key:
    def __init__(self, name, bits):
        p, q = prime(name + b" p", bits // 2), prime(name + b" q", bits // 2)
        self.n, self.d, self.size = p * q, pow(E, -1, (p - 1) * (q - 1)), bits // 8

    def modulus(self):
        return self.n.to_bytes(self.size, "big")

    def spki(self):
        """SubjectPublicKeyInfo (RFC 5280) in DER."""
        rsa = der(0x30, der(0x02, b"\0" + self.modulus()) + der(0x02, E.to_bytes(3, "big")))
        algorithm = der(0x30, bytes.fromhex("06092a864886f70d0101010500"))  # rsaEncryption, NULL
        return der(0x30, algorithm + der(0x03, b"\0" + rsa))

    def encrypt(self, message, seed):
        """RSAES-OAEP (RFC 8017 section 7.1.1) with SHA-256 and no label."""
        block = sha256(b"") + bytes(self.size - len(message) - 66) + b"\1" + message
        block = xor(block, stream(seed, len(block)))
        padded = xor(seed, stream(block, 32)) + block
        return pow(int.from_bytes(padded, "big"), E, self.n).to_bytes(self.size, "big")

    def sign(self, message):
        """RSASSA-PKCS1-v1_5 (section 8.2.1) with SHA-256."""
        info = bytes.fromhex("3031300d060960864801650304020105000420") + sha256(message)
        padded = b"\0\1" + b"\xff" * (self.size - len(info) - 3) + b"\0" + info
        return pow(int.from_bytes(padded, "big"), self.d, self.n).to_bytes(self.size, "big")


def der(tag, content):
    length = len(content)
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag]) + (bytes([length]) if length < 128 else bytes([128 + len(octets)]) + octets) + content


def xor(one, other):
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def kek(bits):
    encryption, signing = Key(b"encryption %d" % bits, bits), Key(b"signing %d" % bits, bits)
    name = CKA_ID + sha256(encryption.spki()) + sha256(signing.spki())
    identity = sha256(b"trousseau kek v1\0pkcs11\0" + name)[:16]
    signed = lambda key, ciphertext, identity=identity, prefix=b"trousseau rsa-oaep v1\0": ciphertext + key.sign(
        prefix + identity + ciphertext)
    mine, foreign = encryption.encrypt(DEK, sha256(b"seed")), encryption.encrypt(bytes(32), sha256(b"forger"))
    good = signed(signing, mine)
    forger, flip = Key(b"forger %d" % bits, bits), lambda data, at: data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]
    bad = {
        "unsigned: only the ciphertext": foreign,
        "unsigned: zeros for a signature": foreign + bytes(encryption.size),
        "unsigned: the ciphertext twice": foreign + foreign,
        "another ciphertext under a true signature": foreign + good[encryption.size:],
        "signed again by another key": signed(forger, foreign),
        "the true ciphertext, signed again by another key": signed(forger, mine),
        "signed by the key that decrypts": signed(encryption, foreign),
        "signed for another KEK": signed(signing, mine, identity=bytes(16)),
        "signed without the words before it": signed(signing, mine, prefix=b""),
        "ciphertext changed": flip(good, 0),
        "signature changed": flip(good, len(good) - 1),
        "signature one byte short": good[:-1],
        "signature one byte longer": good + b"\0",
        "empty": b"",
    }
    return dict(bits=bits, cka_id=CKA_ID, modulus=encryption.modulus(), signing_modulus=signing.modulus(),
                identity=identity, dek=DEK, good=good, private_exponent=encryption.d.to_bytes(encryption.size, "big"),
                bad=[dict(name=name, wrapped=wrapped) for name, wrapped in bad.items()])


def main():
    text = json.dumps([kek(2048), kek(3072)], indent=1, default=bytes.hex) + "\n"
    if "--check" not in sys.argv:
        PATH.write_text(text)
    elif PATH.read_text() != text:
        sys.exit(f"{PATH} is not what this implementation makes")


main()
