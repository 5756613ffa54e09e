package client

import (
	"math/rand/v2"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

func newRandom(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 1)) }

func randomKey(r *rand.Rand) []byte { return []byte{'k', byte('a' + r.IntN(5))} }

// randomBounds is a key, a half open range, or all from a key.
func randomBounds(r *rand.Rand) (key, end []byte) {
	switch r.IntN(4) {
	case 0:
		return randomKey(r), randomKey(r)
	case 1:
		return randomKey(r), []byte{0}
	default:
		return randomKey(r), nil
	}
}

// randomTxn has operations of every kind, nested at most depth deep.
func randomTxn(r *rand.Rand, depth int) *pb.TxnRequest {
	txn := &pb.TxnRequest{}
	for range r.IntN(3) {
		txn.Compare = append(txn.Compare, randomCompare(r))
	}
	for range r.IntN(4) {
		txn.Success = append(txn.Success, randomOp(r, depth))
	}
	for range r.IntN(3) {
		txn.Failure = append(txn.Failure, randomOp(r, depth))
	}
	return txn
}

func randomCompare(r *rand.Rand) *pb.Compare {
	compare := &pb.Compare{Result: pb.Compare_CompareResult(r.IntN(4))}
	compare.Key, compare.RangeEnd = randomBounds(r)
	number := int64(r.IntN(4))
	switch r.IntN(4) {
	case 0:
		compare.Target, compare.TargetUnion = pb.Compare_VERSION, &pb.Compare_Version{Version: number}
	case 1:
		compare.Target, compare.TargetUnion = pb.Compare_VALUE, &pb.Compare_Value{Value: []byte{byte('0' + number)}}
	case 2:
		compare.Target, compare.TargetUnion = pb.Compare_CREATE, &pb.Compare_CreateRevision{CreateRevision: number * 10}
	default:
		compare.Target, compare.TargetUnion = pb.Compare_MOD, &pb.Compare_ModRevision{ModRevision: number * 20}
	}
	return compare
}

func randomOp(r *rand.Rand, depth int) *pb.RequestOp {
	switch kind := r.IntN(8); {
	case kind < 3:
		put := &pb.PutRequest{Key: randomKey(r), Value: []byte{byte('0' + r.IntN(4))}, PrevKv: r.IntN(2) == 0}
		if r.IntN(12) == 0 {
			put.Lease = 1 + r.Int64N(3)
		}
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put}}
	case kind == 3:
		remove := &pb.DeleteRangeRequest{PrevKv: r.IntN(2) == 0}
		remove.Key, remove.RangeEnd = randomBounds(r)
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: remove}}
	case kind == 4 && depth > 0:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: randomTxn(r, depth-1)}}
	default:
		get := &pb.RangeRequest{Limit: int64(r.IntN(3)), CountOnly: r.IntN(5) == 0, KeysOnly: r.IntN(5) == 0}
		get.Key, get.RangeEnd = randomBounds(r)
		get.SortOrder, get.SortTarget = pb.RangeRequest_SortOrder(r.IntN(3)), pb.RangeRequest_SortTarget(r.IntN(5))
		if r.IntN(6) == 0 {
			get.Revision = pick[int64](r, -1, 1, 5, 30, 100, 1<<40)
		}
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: get}}
	}
}
