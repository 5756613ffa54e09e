//! Messages to and from gRPC frames.
//!
//! Differs from tonic's own prost codec in three points: the buffer of an answer is allocated once, at its exact size; a
//! range answer whose keys do not leave as they are is consumed while it is written (see [`crate::wire`]); and a request
//! that is not protobuf is refused in the words of etcd's gRPC library.
//!
//! Nesting of a request is bounded by prost at 100 messages, which is 50 nested txns.

use std::any::Any;
use std::marker::PhantomData;

use prost::Message;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

use crate::wire::RangeResponse;

/// The codec of every method: encodes `T`, decodes `U`.
#[derive(Debug)]
pub struct WireCodec<T, U>(PhantomData<fn(T) -> U>);

impl<T, U> Default for WireCodec<T, U> {
    fn default() -> Self {
        WireCodec(PhantomData)
    }
}

impl<T, U> Codec for WireCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = WireEncoder<T>;
    type Decoder = WireDecoder<U>;

    fn encoder(&mut self) -> WireEncoder<T> {
        WireEncoder(PhantomData)
    }

    fn decoder(&mut self) -> WireDecoder<U> {
        WireDecoder(PhantomData)
    }
}

/// Writes answers.
#[derive(Debug)]
pub struct WireEncoder<T>(PhantomData<fn(T)>);

impl<T: Message + 'static> Encoder for WireEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, mut item: T, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buf.reserve(item.encoded_len());
        // Which branch is taken is known per `T` when this is compiled.
        match (&mut item as &mut dyn Any).downcast_mut::<RangeResponse>() {
            Some(range) => range.encode_draining(buf),
            None => item.encode_raw(buf),
        }
        Ok(())
    }
}

/// Reads requests.
#[derive(Debug)]
pub struct WireDecoder<U>(PhantomData<fn() -> U>);

impl<U: Message + Default> Decoder for WireDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        U::decode(buf)
            .map(Some)
            .map_err(|error| Status::internal(format!("grpc: error unmarshalling request: {error}")))
    }
}
