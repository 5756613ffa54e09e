package client

import (
	"context"
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
)

// pair is an etcd and a tenured that are sent the same requests, as protobuf: also those that the client cannot make.
// Where the number of combinations is large, comparing the answers says more than expectations by hand.
type pair struct {
	etcd, tenured *member
}

func newPair(t *testing.T, flags ...string) pair {
	t.Helper()
	return pair{
		etcd:    newMember(t, starts["etcd"](t, flags...)),
		tenured: newMember(t, starts["tenured"](t, flags...)),
	}
}

// same sends a request to both and demands equal answers: equal protobuf but for the identity in the header, or an
// equal code and text. It returns etcd's answer, nil for an error.
func (p pair) same(t *testing.T, request proto.Message) proto.Message {
	t.Helper()
	want, wantErr := call(testContext(t), p.etcd.ActiveConnection(), request)
	if status.Code(wantErr) == codes.Unavailable {
		t.Fatalf("etcd: %v", wantErr)
	}
	got, gotErr := call(testContext(t), p.tenured.ActiveConnection(), request)
	if status.Code(gotErr) != status.Code(wantErr) || status.Convert(gotErr).Message() != status.Convert(wantErr).Message() {
		t.Errorf("%s\netcd:    %s\ntenured: %s", textOf(request), answer(want, wantErr), answer(got, gotErr))
		return nil
	}
	if wantErr != nil {
		return nil
	}
	if !proto.Equal(got, want) {
		t.Errorf("%s\netcd:    %s\ntenured: %s", textOf(request), textOf(want), textOf(got))
	}
	return want
}

func answer(response proto.Message, err error) string {
	if err != nil {
		return fmt.Sprintf("%v: %s", status.Code(err), status.Convert(err).Message())
	}
	return textOf(response)
}

func textOf(message proto.Message) string {
	return fmt.Sprintf("%s %s", message.ProtoReflect().Descriptor().Name(), prototext.MarshalOptions{}.Format(message))
}

// call sends one unary request and takes what differs between any two members out of the answer's header.
func call(ctx context.Context, conn grpc.ClientConnInterface, request proto.Message) (proto.Message, error) {
	switch request := request.(type) {
	case *pb.RangeRequest:
		return anonymous(pb.NewKVClient(conn).Range(ctx, request))
	case *pb.PutRequest:
		return anonymous(pb.NewKVClient(conn).Put(ctx, request))
	case *pb.DeleteRangeRequest:
		return anonymous(pb.NewKVClient(conn).DeleteRange(ctx, request))
	case *pb.TxnRequest:
		return anonymous(pb.NewKVClient(conn).Txn(ctx, request))
	case *pb.CompactionRequest:
		return anonymous(pb.NewKVClient(conn).Compact(ctx, request))
	case *pb.LeaseGrantRequest:
		return anonymous(pb.NewLeaseClient(conn).LeaseGrant(ctx, request))
	case *pb.LeaseRevokeRequest:
		return anonymous(pb.NewLeaseClient(conn).LeaseRevoke(ctx, request))
	case *pb.HashKVRequest:
		return anonymous(pb.NewMaintenanceClient(conn).HashKV(ctx, request))
	default:
		panic(fmt.Sprintf("no call for %T", request))
	}
}

func anonymous[Response interface {
	proto.Message
	GetHeader() *pb.ResponseHeader
}](response Response, err error) (proto.Message, error) {
	if err != nil {
		return nil, err
	}
	if header := response.GetHeader(); header != nil {
		header.ClusterId, header.MemberId, header.RaftTerm = 0, 0, 0
	}
	return response, nil
}
