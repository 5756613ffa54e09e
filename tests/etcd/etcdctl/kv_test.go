package etcdctl

import (
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// commands turns plain command lines into steps.
func commands(lines ...string) []step {
	steps := make([]step, len(lines))
	for i, line := range lines {
		steps[i] = step{args: line}
	}
	return steps
}

// inFormats runs each command in every format; message is what it prints as protobuf, nil if that format does not exist.
func inFormats(message proto.Message, lines ...string) []step {
	var steps []step
	for _, line := range lines {
		steps = append(steps, commands(line, line+" -w json", line+" -w fields")...)
		if message != nil {
			steps = append(steps, step{args: line + " -w protobuf", proto: message})
		}
	}
	return steps
}

func join(parts ...[]step) []step {
	var all []step
	for _, part := range parts {
		all = append(all, part...)
	}
	return all
}

// fruit takes the revisions 2 to 8.
var fruit = commands(
	"put apple red", "put banana yellow", "put cherry red", "put apple green", "put date ''", "put banana brown", "put app short",
)

var readScenarios = []scenario{
	{name: "get in every format", steps: join(fruit, inFormats(&pb.RangeResponse{},
		"get apple",
		"get nothing",
		"get a --prefix",
		"get '' --prefix",
		"get apple date",
		"get date apple",
		"get banana --from-key",
		"get '' --prefix --limit=2",
		"get '' --prefix --limit=5",
		"get '' --prefix --keys-only",
		"get '' --prefix --count-only",
		"get '' --prefix --count-only --limit=1",
		"get apple --rev=2",
		"get date --rev=5",
		"get '' --prefix --rev=4",
		"get '' --prefix --rev=4 --limit=1",
		"get '' --prefix --consistency=s",
		"get apple --stream",
		"get '' --prefix --stream",
		"get '' --prefix --stream --rev=4 --keys-only",
		"get nothing --stream",
	), commands(
		"get apple -w table",
		"get apple -w nonsense",
		"get apple --hex",
		"get apple --hex -w json",
		"get apple --hex -w fields",
	))},
	{name: "get in order", steps: join(fruit, inFormats(nil,
		"get '' --prefix --order=DESCEND",
		"get '' --prefix --order=ASCEND --sort-by=KEY",
		"get '' --prefix --order=DESCEND --sort-by=KEY --limit=2",
		"get '' --prefix --order=ASCEND --sort-by=CREATE",
		"get '' --prefix --order=DESCEND --sort-by=CREATE --limit=1",
		"get '' --prefix --order=ASCEND --sort-by=MODIFY",
		"get '' --prefix --order=DESCEND --sort-by=MODIFY",
		"get '' --prefix --order=ASCEND --sort-by=VERSION --limit=3",
		"get '' --prefix --order=DESCEND --sort-by=VERSION",
		"get '' --prefix --order=ASCEND --sort-by=VALUE",
		"get '' --prefix --order=DESCEND --sort-by=VALUE --keys-only",
		"get '' --prefix --sort-by=CREATE",
		"get '' --prefix --sort-by=MODIFY --rev=5",
		"get '' --prefix --min-mod-rev=5",
		"get '' --prefix --max-mod-rev=5",
		"get '' --prefix --min-mod-rev=5 --max-mod-rev=6",
		"get '' --prefix --min-create-rev=4",
		"get '' --prefix --max-create-rev=3",
		"get '' --prefix --min-create-rev=3 --max-create-rev=4 --limit=1",
		"get '' --prefix --min-mod-rev=100",
		"get '' --prefix --min-mod-rev=5 --count-only",
	), commands(
		"get apple --print-value-only",
		"get '' --prefix --print-value-only --order=DESCEND",
		"get '' --prefix --max-create-rev=3 --stream",
		"get '' --prefix --order=DESCEND --stream",
	))},
	{name: "get that is refused", steps: join(fruit, commands(
		"get",
		"get ''",
		"get '' -w json",
		"get a b c",
		"get --prefix",
		"get '' --from-key",
		"get a --prefix --from-key",
		"get a b --prefix",
		"get a --keys-only --count-only",
		"get a --count-only",
		"get a --print-value-only -w json",
		"get a --consistency=x",
		"get a --order=SIDEWAYS",
		"get a --sort-by=COLOUR",
		"get a --min-mod-rev=5 --max-mod-rev=4",
		"get a --min-create-rev=5 --max-create-rev=4",
		"get a --rev=nonsense",
		"get a --limit=-1",
		"get a --rev=-1",
		"get a --nonsense",
		"get apple --rev=9",
		"get apple --rev=9 --consistency=s",
		"get apple --rev=9 --stream",
		"get '' --stream",
		// Auth is off, which the client takes as leave to go on without.
		"get apple --user root:secret",
	))},
}

var writeScenarios = []scenario{
	{name: "put", steps: join(inFormats(&pb.PutResponse{},
		"put key one",
		"put key two --prev-kv",
		"put key --ignore-value --prev-kv",
		"put new v --prev-kv",
	), commands(
		"get key -w fields",
		"put key three --ignore-value",
		"put missing --ignore-value",
		"put missing v --ignore-lease",
		"put key v --lease=1234",
		"put key v --lease=-5",
		"put key v --lease=nonsense",
		"put key v --hex --prev-kv",
		"put -- key -dash",
		"put key --prev-kv -- -dash",
		"put",
		"put ''",
		"put '' v",
		"put key",
		"put a b c",
		"put key v -w table",
		"put key v --nonsense",
		"get '' --prefix -w json",
	), []step{
		{args: "put from-stdin", stdin: "a value\nof two lines\n"},
		{args: "get from-stdin"},
		{args: "get from-stdin -w json"},
		{args: "put bytes", stdin: "\x00\xff\"quoted\"\xc3\xa4"},
		{args: "get bytes"},
		{args: "get bytes --hex"},
		{args: "get bytes -w json"},
		{args: "get bytes -w fields"},
	})},
	{name: "request too large", steps: join([]step{
		{args: "put kept 1"},
		{args: "put at-the-limit", stdin: strings.Repeat("x", 1536*1024-64)},
		{args: "get at-the-limit --keys-only"},
		{args: "put over-the-limit", stdin: strings.Repeat("x", 1536*1024)},
		{args: "put over-the-clients-limit", stdin: strings.Repeat("x", 2*1024*1024)},
		{args: "put over-the-messages-limit --max-request-bytes=4194304", stdin: strings.Repeat("x", 3*1024*1024)},
		{args: "txn", stdin: "\nput '" + strings.Repeat("k", 1600*1024) + "' v\n\n\n"},
		{args: "txn", stdin: "\n" + "put a b\n" + strings.Repeat("get a\n", 128) + "\n\n"},
		{args: "txn", stdin: "\n" + strings.Repeat("get a\n", 128) + "\n\n"},
		{args: "put " + strings.Repeat("k", 100*1024) + " v"},
	}, commands(
		"get k --prefix --count-only -w fields",
		"get '' --prefix --keys-only --limit=2 -w json",
	))},
	// Of a watch in the past, Tenure's responses end at 2 MiB (docs/compatibility.md), which this form of output does not show.
	// An answer is as long as the numbers in its header.
	{name: "answers of megabytes", masks: []mask{hide(`larger than max \(31458\d\d vs`, "larger than max (SIZE vs")}, steps: []step{
		{args: "put large1", stdin: strings.Repeat("1", 1024*1024)},
		{args: "put large2", stdin: strings.Repeat("2", 1024*1024)},
		{args: "put large3", stdin: strings.Repeat("3", 1024*1024)},
		{args: "put large1 --prev-kv -w json", stdin: strings.Repeat("4", 1024*1024)},
		{args: "get large --prefix -w json"},
		{args: "get large --prefix --stream -w json"},
		{args: "get large --prefix --max-recv-bytes=1000000"},
		{args: "watch large --prefix --rev=2 --prev-kv", talk: []turn{{lines: 14}}},
		{args: "txn", stdin: "\nget large --prefix --limit=2\nget large1\n\n\n"},
		{args: "del large --prefix --prev-kv"},
	}},
	{name: "limits of the flags", flags: []string{"--max-request-bytes=2000", "--max-txn-ops=2"}, steps: []step{
		{args: "put a", stdin: strings.Repeat("x", 1900)},
		{args: "put a", stdin: strings.Repeat("x", 2100)},
		{args: "txn", stdin: "\nput a 1\nput b 1\n\n\n"},
		{args: "txn", stdin: "\nput a 1\nput b 1\nput c 1\n\n\n"},
		{args: "txn", stdin: "\n\nput a 1\nput b 1\nput c 1\n\n"},
		{args: "txn", stdin: "mod(\"a\") > \"0\"\nmod(\"a\") > \"0\"\nmod(\"a\") > \"0\"\n\n\n\n"},
		{args: "get '' --prefix -w json"},
	}},
	{name: "del", steps: join(fruit, inFormats(&pb.DeleteRangeResponse{},
		"del apple --prev-kv",
		"del a --prefix --prev-kv",
		"del banana cherry --range --prev-kv",
	), commands(
		// Without --range etcdctl warns, and waits.
		"del cherry d",
		"get '' --prefix",
		"get cherry -w json",
		"get cherry --rev=8 -w json",
		"put cherry again",
		"get cherry -w json",
		"del cherry --from-key -w json",
		"del nothing",
		"del nothing --prev-kv -w json",
		"put x 1",
		"put y 2",
		"del y x --range",
		"del x --hex --prev-kv",
		"del '' --prefix",
		"del '' --prefix -w json",
		"del '' --from-key -w json",
		"del",
		"del ''",
		"del a b c",
		"del a --prefix --from-key",
		"del a b --prefix",
		"del a --nonsense",
		"del a -w table",
	))},
	{name: "compaction", steps: join(fruit, commands(
		"compaction 4",
		"get apple --rev=2",
		"get apple --rev=2 -w json",
		"get apple --rev=3 --consistency=s",
		"get apple --rev=3 --stream",
		"get apple --rev=4",
		"get '' --prefix --rev=4 -w json",
		"compaction 4",
		"compaction 3",
		"compaction 4 --physical",
		"compaction 100",
		"compaction 100 --physical",
		"compaction 8 --physical",
		"get '' --prefix --rev=8 -w json",
		"get '' --prefix --rev=7",
		"get '' --prefix -w json",
		"put apple late",
		"del apple",
		"compaction 10 --physical",
		"get apple",
		"get '' --prefix -w fields",
		"compaction",
		"compaction nonsense",
		"compaction 0",
		"compaction -- -1",
		"compaction 1 2",
		"compact 10",
	), []step{
		{args: "txn", stdin: "\nget apple --rev=9\n\n\n"},
		{args: "txn", stdin: "\nput apple v\nget apple --rev=9\n\n\n"},
		{args: "txn", stdin: "\nput apple v\nget apple --rev=12\n\n\n"},
		{args: "txn", stdin: "\nput apple v\nget apple --rev=10\n\n\n"},
		{args: "get '' --prefix -w json"},
	})},
}
