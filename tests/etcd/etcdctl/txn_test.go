package etcdctl

import pb "go.etcd.io/etcd/api/v3/etcdserverpb"

// txnInFormats runs a txn in every format; the store goes on from one to the next.
func txnInFormats(stdin string) []step {
	steps := inFormats(&pb.TxnResponse{}, "txn")
	for i := range steps {
		steps[i].stdin = stdin
	}
	return steps
}

// conditions checks each condition in a txn of its own, whose answer is whether it held.
func conditions(conditions ...string) []step {
	steps := make([]step, len(conditions))
	for i, condition := range conditions {
		steps[i] = step{args: "txn", stdin: condition + "\n\n\n\n"}
	}
	return steps
}

var txnScenarios = []scenario{
	// A condition on a lease and one with ">=" make this etcdctl crash before it asks the server.
	{name: "txn conditions", steps: join(fruit, conditions(
		`mod("apple") = "5"`, `mod("apple") = "2"`, `mod("apple") > "4"`, `mod("apple") > "5"`, `mod("apple") < "6"`, `mod("apple") < "5"`,
		`mod("apple") != "5"`, `mod("apple") != "4"`, `m("apple") = "5"`,
		`create("apple") = "2"`, `create("apple") > "2"`, `create("apple") < "3"`, `create("apple") != "3"`, `c("apple") = "2"`,
		`version("apple") = "2"`, `version("apple") > "1"`, `version("apple") < "2"`, `version("apple") != "2"`, `ver("cherry") = "1"`,
		`value("apple") = "green"`, `value("apple") = "red"`, `value("apple") > "gree"`, `value("apple") < "gree"`, `value("apple") != "red"`,
		`val("date") = ""`, `value("date") > ""`,
		`mod("missing") = "0"`, `create("missing") = "0"`, `version("missing") = "0"`, `version("missing") > "0"`,
		`value("missing") = ""`, `value("missing") != "x"`,
		"mod(\"apple\") = \"5\"\nversion(\"banana\") = \"2\"", "mod(\"apple\") = \"5\"\nversion(\"banana\") = \"3\"",
		`mod("") = "0"`,
		`mod("apple") = "five"`, `colour("apple") = "green"`, `mod(apple) = 5`, `nonsense`,
	), []step{
		{args: "get '' --prefix -w json"},
	})},
	{name: "txn branches", steps: join(fruit[:3], []step{
		{args: "txn", stdin: "mod(\"apple\") = \"2\"\n\nput apple taken\nget apple\n\nget banana\n\n"},
		{args: "txn", stdin: "mod(\"apple\") = \"2\"\n\nput apple taken\n\nget apple\ndel banana\n\n"},
		{args: "txn", stdin: "value(\"cherry\") = \"red\"\n\nput cherry eaten\ndel apple --prev-kv\nput new key\n\n\n"},
		{args: "txn", stdin: "value(\"missing\") = \"\"\n\nput is there\n\nput is missing\n\n"},
		{args: "get '' --prefix -w json"},
	}, txnInFormats(
		"version(\"cherry\") > \"0\"\n\nget '' --prefix\nget c --prefix --limit=1\nput k v --prev-kv\ndel n --prefix --prev-kv\n\n\n",
	), txnInFormats(
		"version(\"cherry\") = \"0\"\n\nput not this\n\nget cherry --keys-only\nget '' --prefix --count-only\nput k w\nget k\ndel k\nget k\n\n",
	), txnInFormats(
		"\n\n\n",
	), txnInFormats(
		"\nget cherry\n\n\n",
	), []step{
		{args: "txn", stdin: "\ndel nothing\n\n\n"},
		{args: "txn", stdin: "\ndel a b\n\n\n"},
		{args: "txn", stdin: "\nput \"quoted key\" \"two\\nlines\"\nget 'quoted key'\n\n\n"},
		{args: "txn", stdin: "\nget apple --rev=2\nget '' --prefix --order=DESCEND --sort-by=MODIFY\n\n\n"},
		{args: "txn --hex", stdin: "\nget cherry\n\n\n"},
		{args: "get '' --prefix -w json"},
	})},
	// Not one that deletes a key and then puts it with --ignore-value: it crashes etcd (docs/compatibility.md).
	{name: "txn that is refused", steps: join(fruit[:3], []step{
		{args: "txn", stdin: "\nput twice 1\nput twice 2\n\n\n"},
		{args: "txn", stdin: "\nput a 1\nput b 1\n\nput twice 1\nput twice 2\n\n"},
		{args: "txn", stdin: "\nput twice 1\ndel t --prefix\n\n\n"},
		{args: "txn", stdin: "\ndel t --prefix\nput twice 1\n\n\n"},
		{args: "txn", stdin: "\ndel cherry\ndel cherry\n\n\n"},
		{args: "txn", stdin: "\nput '' v\n\n\n"},
		{args: "txn", stdin: "\nget ''\n\n\n"},
		{args: "txn", stdin: "\ndel ''\n\n\n"},
		{args: "txn", stdin: "\nput k v --lease=77\n\n\n"},
		{args: "txn", stdin: "\nput a before\nput missing --ignore-value\n\n\n"},
		{args: "txn", stdin: "\nput a before\nput missing v --ignore-lease\n\n\n"},
		{args: "txn", stdin: "\nget apple --rev=100\n\n\n"},
		{args: "txn", stdin: "\nput a before\nget apple --rev=100\n\n\n"},
		{args: "txn", stdin: "\ncompact 2\n\n\n"},
		{args: "txn", stdin: "\nput\n\n\n"},
		{args: "txn", stdin: "\nput key value\n"},
		{args: "txn argument", stdin: "\n\n\n"},
		{args: "txn"},
		{args: "txn -w table", stdin: "\n\n\n"},
		{args: "get '' --prefix -w json"},
	})},
}
