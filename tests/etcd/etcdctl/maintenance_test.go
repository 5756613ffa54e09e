package etcdctl

import (
	"slices"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Of a status: the member's id, the version, sizes but for the quota, and raft's numbers. The rest is compared.
var statusMasks = []mask{
	hide(`ADDRESS, [0-9a-f]+, 3\.7\.\d+, (3\.7\.0), [\d.]+ [kM]?B, [\d.]+ [kM]?B, \d+%, (.*, (?:true|false), (?:true|false)), \d+, \d+, \d+, `,
		"ADDRESS, ID, VERSION, $1, SIZE, SIZE, SHARE, $2, TERM, INDEX, INDEX, "),
	hide(`│ [0-9a-f]+ │ 3\.7\.\d+ │ (3\.7\.0) │ [\d.]+ [kM]?B │ [\d.]+ [kM]?B │ \d+% │ (.* │ (?:true|false) │ (?:true|false)) │ \d+ │ \d+ │ \d+ │`,
		"│ ID │ VERSION │ $1 │ SIZE │ SIZE │ SHARE │ $2 │ TERM │ INDEX │ INDEX │"),
	hide(`"(dbSize|dbSizeInUse|raftIndex|raftAppliedIndex|raftTerm|leader)":[1-9]\d*`, `"$1":N`),
	hide(`"(DBSize|DBSizeInUse|RaftIndex|RaftAppliedIndex|Leader)" : [1-9]\d*`, `"$1" : N`),
	hide(`"version":"3\.7\.\d+"`, `"version":"VERSION"`),
	hide(`"Version" : "3\.7\.\d+"`, `"Version" : "VERSION"`),
}

// The member of an alarm.
var alarmMasks = []mask{
	hide(`memberID:\d+ `, "memberID:ID "),
	hide(`"memberID":\d+,"alarm"`, `"memberID":ID,"alarm"`),
	hide(`"MemberID" : \d+\n"AlarmType"`, "\"MemberID\" : ID\n\"AlarmType\""),
}

// raised waits for the storage version, which etcd raises from 3.5.0 a while after it started.
var raised = []step{{args: "endpoint status", until: "3.7.0,"}}

// A table's columns are as wide as what is in them, masked or not.
var tablePadding = []mask{hide(` +`, " "), hide(`─+`, "─")}

// What the client measured.
var tookMasks = []mask{
	hide(`took (= )?[\d.]+[µm]?s`, "took ${1}TIME"),
	hide(`"took":"[\d.]+[µm]?s"`, `"took":"TIME"`),
	hide(`"Took" : [\d.]+[µm]?s`, `"Took" : TIME`),
	hide(`│ (true|false) │ [\d.]+[µm]?s │`, "│ $1 │ TIME │"),
}

// A member's id and its address for its peers, which Tenure has none of as yet.
var memberMasks = []mask{
	hide(`http://localhost:2380`, "ADDRESS"),
	hide(`(^|\n)[0-9a-f]+, started`, "${1}ID, started"),
	hide(`│ [0-9a-f]+ │ started`, "│ ID │ started"),
	hide(`"ID":"?[0-9a-f]+"?`, `"ID":ID`),
	hide(`"ID" : [0-9a-f]+`, `"ID" : ID`),
}

// Left out, as README.md says that the server does not have them: snapshot save, move-leader, downgrade, member add, remove, update and
// promote, auth enable and disable, user and role.
var maintenanceScenarios = []scenario{
	{name: "endpoint status", masks: slices.Concat(tablePadding, statusMasks), steps: join(raised, inFormats(nil, "endpoint status"), fruit, inFormats(nil,
		"endpoint status",
		"endpoint status --cluster",
	), commands(
		"endpoint status -w table",
		"endpoint status -w protobuf",
		"endpoint status nonsense",
		"endpoint nonsense",
	))},
	{name: "endpoint health", masks: slices.Concat(tablePadding, tookMasks), steps: join(inFormats(nil,
		"endpoint health",
		"endpoint health --cluster",
	), commands(
		"endpoint health -w table",
		"endpoint health -w protobuf",
	))},
	{name: "endpoint hashkv", masks: tablePadding, steps: join(commands("endpoint hashkv -w json"), fruit, inFormats(nil,
		"endpoint hashkv",
		"endpoint hashkv --cluster",
		"endpoint hashkv --rev=5",
	), commands(
		"endpoint hashkv -w table",
		"endpoint hashkv --rev=2 -w json",
		"endpoint hashkv --rev=1 -w json",
		"endpoint hashkv --rev=8 -w json",
		"endpoint hashkv --rev=9",
		"endpoint hashkv --rev=nonsense",
	))},
	// No key with a lease: its id is hashed too. And no revision of a compaction: etcd remembers what the hash of the last ten was
	// (docs/compatibility.md).
	{name: "endpoint hashkv of compacted history", steps: join(fruit, commands(
		"del banana",
		"put banana back",
		"del cherry",
		"compaction 6 --physical",
		"endpoint hashkv -w json",
		"endpoint hashkv --rev=5 -w json",
		"endpoint hashkv --rev=7 -w json",
		"endpoint hashkv --rev=9 -w json",
		"compaction 11 --physical",
		"endpoint hashkv -w json",
		"del a --prefix",
		"endpoint hashkv -w json",
		"endpoint hashkv --rev=9 -w json",
	))},
	{name: "members", masks: slices.Concat(tablePadding, memberMasks), steps: join(inFormats(&pb.MemberListResponse{},
		"member list",
		"member list --consistency=s",
	), commands(
		"member list -w table",
		"member list -w json --hex",
		"member list -w fields --hex",
		"member nonsense",
	))},
	{name: "alarms, defrag and auth", masks: tookMasks, steps: join(inFormats(&pb.AlarmResponse{},
		"alarm list",
		"alarm disarm",
	), inFormats(&pb.AuthStatusResponse{},
		"auth status",
	), fruit, commands(
		"compaction 8 --physical",
		"defrag",
		"defrag --cluster",
		"get '' --prefix -w json",
		"alarm list extra",
		"alarm disarm extra",
		"auth status extra",
		"alarm nonsense",
		"version",
		"nonsense",
	))},
	// Below the quota etcd refuses on an estimate up to 100 ms old, so the put that is refused is much too large for both. And nothing
	// that is refused is invalid besides: which of the two etcd says differs (docs/compatibility.md).
	{name: "quota", flags: []string{"--quota-backend-bytes=1000000"}, masks: slices.Concat(tablePadding, statusMasks, tookMasks, alarmMasks), steps: join(raised, []step{
		{args: "put small 1"},
		{args: "lease grant 100000"},
		{args: "put large", stdin: strings.Repeat("x", 1200*1024)},
	}, inFormats(&pb.AlarmResponse{}, "alarm list"), inFormats(nil, "endpoint status", "endpoint health"), commands(
		"put small 2",
		"lease grant 100000",
		"get small -w json",
		"lease revoke $LEASE1",
	), []step{
		{args: "txn", stdin: "\nget small\n\n\n"},
		{args: "txn", stdin: "\nput small 2\n\n\n"},
		{args: "txn", stdin: "\ndel small --prev-kv\n\n\n"},
	}, commands(
		"compaction 3",
		"del small",
		"alarm disarm",
		"alarm list",
		"put small 3",
		"endpoint health",
		"get '' --prefix -w json",
	))},
}
