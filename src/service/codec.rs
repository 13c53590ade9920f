//! How messages are laid out in memory: prost's encoding, in buffers as small as ours are. tonic's own begin with 8 KiB
//! for each message, which is more than the allocator hands out quickly.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::ProstCodec;

/// Bytes that a buffer begins with. A v2 answer has at most some 1,100.
const BUFFER: usize = 1024;
/// Bytes that a stream may buffer before it is flushed.
const FLUSH_AT: usize = 32 * 1024;

/// Encodes `T` and decodes `U`.
pub(super) struct SmallMessages<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for SmallMessages<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for SmallMessages<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = <ProstCodec<T, U> as Codec>::Encoder;
    type Decoder = <ProstCodec<T, U> as Codec>::Decoder;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::new(BUFFER, FLUSH_AT))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(BufferSettings::new(BUFFER, FLUSH_AT))
    }
}
