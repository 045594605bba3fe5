package main

import (
	"bytes"
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/fault"
	"trainerd/rollout"
	"trainerd/rollout/arrowio"
	"trainerd/trainer"
)

// tableOf returns the first two cells of each row of the table below a heading of docs/training.md.
func tableOf(t *testing.T, heading string) map[string]string {
	t.Helper()
	page, err := os.ReadFile("../../docs/training.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(page), "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("docs/training.md has no section %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	rows := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| `?([^`|]*?)`? \\|").FindAllStringSubmatch(section, -1) {
		if _, twice := rows[m[1]]; twice {
			t.Errorf("%s is in the table twice", m[1])
		}
		rows[m[1]] = m[2]
	}
	return rows
}

// TestSettingsAreDocumented: the page has every setting of a job with its default, and no other.
func TestSettingsAreDocumented(t *testing.T) {
	spec, err := trainer.ParseSpec([]byte(`{"model":{"source":"dir:/m"}}`))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	var walk func(path string, raw json.RawMessage)
	walk = func(path string, raw json.RawMessage) {
		var members map[string]json.RawMessage
		if path == "objective.reward_weights" || json.Unmarshal(raw, &members) != nil {
			want[path] = string(raw)
			return
		}
		for name, value := range members {
			walk(strings.TrimPrefix(path+"."+name, "."), value)
		}
	}
	walk("", raw)
	want["model.source"] = "required"
	if d := cmp.Diff(want, tableOf(t, "Settings of a job")); d != "" {
		t.Errorf("docs/training.md (-server +page):\n%s", d)
	}
}

// TestColumnsAreDocumented: the page has every column that a batch may have, and no other.
func TestColumnsAreDocumented(t *testing.T) {
	b := &rollout.Batch{Rollouts: []rollout.Rollout{{GroupID: "a", Prompt: []int32{1}, Completion: []int32{1}}}, HasReward: true}
	var body bytes.Buffer
	if err := arrowio.Encode(&body, b, ""); err != nil {
		t.Fatal(err)
	}
	misnamed := bytes.ReplaceAll(body.Bytes(), []byte("group_id"), []byte("group_ix"))
	limits := rollout.Limits{MaxBytes: 1 << 20, MaxRows: 1, MaxTokens: 2, MaxPromptTokens: 1, MaxCompletionTokens: 1, Vocab: 2}
	_, err := arrowio.Decode(bytes.NewReader(misnamed), rollout.Schema{}, limits)
	f, ok := fault.As(err)
	if !ok || f.Code != "unknown_column" || len(f.Fields) != 1 {
		t.Fatalf("error %v, expected an unknown column", err)
	}
	known, ok := strings.CutPrefix(f.Fields[0].Expected, "one of ")
	if !ok {
		t.Fatalf("expected %q", f.Fields[0].Expected)
	}
	want := map[string]bool{}
	for _, name := range strings.Split(known, ", ") {
		want[name] = true
	}
	got := map[string]bool{}
	for name := range tableOf(t, "Columns of a batch") {
		got[name] = true
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("docs/training.md (-server +page):\n%s", d)
	}
}
