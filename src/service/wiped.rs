//! The messages that carry plaintext: it is wiped with each of them, whoever drops it, tonic or we, and before it has come
//! whole too.

use zeroize::{Zeroize, ZeroizeOnDrop};

use super::proto::{v1beta1, v2};

macro_rules! wiped {
    ($($message:ty: $plaintext:ident,)*) => {$(
        impl Zeroize for $message {
            fn zeroize(&mut self) {
                self.$plaintext.zeroize();
            }
        }

        impl Drop for $message {
            fn drop(&mut self) {
                self.zeroize();
            }
        }

        impl ZeroizeOnDrop for $message {}
    )*};
}

wiped! {
    v2::EncryptRequest: plaintext,
    v2::DecryptResponse: plaintext,
    v1beta1::EncryptRequest: plain,
    v1beta1::DecryptResponse: plain,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wipes(mut message: impl ZeroizeOnDrop + Zeroize + prost::Message) {
        assert!(message.encoded_len() > 0);
        message.zeroize();
        assert_eq!(message.encoded_len(), 0);
    }

    #[test]
    fn what_carries_plaintext_wipes_it() {
        let seed = || b"seed".to_vec();
        wipes(v2::EncryptRequest { plaintext: seed(), uid: String::new() });
        wipes(v2::DecryptResponse { plaintext: seed() });
        wipes(v1beta1::EncryptRequest { version: String::new(), plain: seed() });
        wipes(v1beta1::DecryptResponse { plain: seed() });
    }
}
