package trainer

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/fault"
)

// TestSpecDefaults holds the defaults to a golden: they are part of the API.
func TestSpecDefaults(t *testing.T) {
	s, err := ParseSpec([]byte(`{"model":{"source":"dir:/m"}}`))
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.MarshalIndent(s, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(filepath.Join("testdata", "defaults.json"))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(strings.TrimSpace(string(want)), string(got)); d != "" {
		t.Errorf("defaults (-golden +got):\n%s", d)
	}
	// What the server answers is a document that makes the same job.
	again, err := ParseSpec(got)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(s, again); d != "" {
		t.Errorf("read back:\n%s", d)
	}
}

func TestSpecExample(t *testing.T) {
	s, err := ParseSpec([]byte(`{"version": 1, "name": "secloop",
	 "model": {"source": "dir:/models/qwen2.5-0.5b"},
	 "objective": {"name": "sa_grpo", "group_size": 7, "epsilon_low": 0.2, "epsilon_high": 0.28, "beta": 0, "iterations": 1, "temperature": 1.0,
	               "reward_weights": {"format": 1, "execution": 1, "evaluation": 1, "penalty": -1}},
	 "optimizer": {"name": "adamw", "lr": 3e-6, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0, "max_grad_norm": 1.0,
	               "schedule": {"name": "constant", "warmup_steps": 0}},
	 "batch": {"groups_per_step": 4, "max_tokens_per_micro_batch": 16384, "max_policy_lag": 4},
	 "checkpoint": {"publish_every_steps": 1, "snapshot_every_steps": 10, "keep_last": 3, "keep_every": 100, "dtype": "source"},
	 "max_steps": 1000, "seed": 0}`))
	if err != nil {
		t.Fatal(err)
	}
	if s.MaxSteps != 1000 || s.Batch.GroupsPerStep != 4 || s.Checkpoint.KeepEvery != 100 || s.Objective.GroupSize != 7 {
		t.Errorf("spec %+v", s)
	}
}

func TestSpecNullMeansDefault(t *testing.T) {
	s, err := ParseSpec([]byte(`{"model":{"source":"dir:/m"},"seed":null,"objective":null,"batch":{"groups_per_step":null,"max_policy_lag":null}}`))
	if err != nil {
		t.Fatal(err)
	}
	if s.Batch.GroupsPerStep != 4 || s.Batch.MaxPolicyLag != -1 {
		t.Errorf("batch %+v, expected 4 groups and no limit of the lag", s.Batch)
	}
}

// TestSpecZeroTakesItsCompanionAlong: a default that a given 0 makes moot is
// shown as 0, so that the answer is a document that makes the same job.
func TestSpecZeroTakesItsCompanionAlong(t *testing.T) {
	s, err := ParseSpec([]byte(`{"model":{"source":"dir:/m"},"sampling":{"max_sequences":0},"checkpoint":{"keep_last":0}}`))
	if err != nil || s.Sampling.MaxTokens != 0 || s.Checkpoint.KeepEvery != 0 {
		t.Errorf("%+v, %+v, %v", s.Sampling, s.Checkpoint, err)
	}
}

func TestSpecStale(t *testing.T) {
	for _, doc := range []string{
		`{"model":{"source":"dir:/m"},"batch":{"stale":"reject"}}`,
		`{"model":{"source":"dir:/m"},"batch":{"stale":"delay","group_timeout":"1m"}}`,
		`{"model":{"source":"dir:/m"},"batch":{"stale":"admit","max_policy_lag":0}}`, // what is published late is admitted
	} {
		if _, err := ParseSpec([]byte(doc)); err != nil {
			t.Errorf("%s: %v", doc, err)
		}
	}
}

func TestSpecRefuses(t *testing.T) {
	for doc, field := range map[string]string{
		`{"model":{"source":"dir:/m"},"priority":0}`:                                                         "priority",
		`{"model":{"source":"dir:/m"},"priority":101}`:                                                       "priority",
		`{"model":{"source":"dir:/m"},"limits":{"max_queued_rollouts":-1}}`:                                  "limits.max_queued_rollouts",
		`{"model":{"source":"dir:/m"},"limits":{"max_queued_batches":1}}`:                                    "limits.max_queued_batches",
		`{"model":{"source":"dir:/m"},"model":{"source":"dir:/n"}}`:                                          "model",
		`{"model":{"source":"dir:"}}`:                                                                        "model.source",
		`{"model":{"source":"s3://bucket"}}`:                                                                 "model.source",
		`{"model":{"source":"job:job-0123456789abcdef"}}`:                                                    "model.source",
		`{"model":{"source":"job:job-0123456789abcdef@-1"}}`:                                                 "model.source",
		`{"model":{"source":"job:../../etc@1"}}`:                                                             "model.source",
		`{"model":"dir:/m"}`:                                                                                 "model",
		`{"model":{"source":"dir:/m"},"version":2}`:                                                          "version",
		`{"model":{"source":"dir:/m"},"max_steps":1e3}`:                                                      "max_steps",
		`{"model":{"source":"dir:/m"},"seed":9007199254740993}`:                                              "seed",
		`{"model":{"source":"dir:/m"},"batch":{"max_tokens_per_micro_batch":1}}`:                             "batch.max_tokens_per_micro_batch",
		`{"model":{"source":"dir:/m"},"batch":{"group_timeout":"soon"}}`:                                     "batch.group_timeout",
		`{"model":{"source":"dir:/m"},"batch":{"missing_policy_step":"maybe"}}`:                              "batch.missing_policy_step",
		`{"model":{"source":"dir:/m"},"batch":{"max_policy_lag":0}}`:                                         "checkpoint.publish_every_steps",
		`{"model":{"source":"dir:/m"},"batch":{"stale":"ignore"}}`:                                           "batch.stale",
		`{"model":{"source":"dir:/m"},"batch":{"stale":"delay"}}`:                                            "batch.stale",
		`{"model":{"source":"dir:/m"},"batch":{"stale":"delay","group_timeout":"1m","max_policy_lag":null}}`: "batch.stale",
		`{"model":{"source":"dir:/m"},"batch":{"stale":"admit","max_policy_lag":-1}}`:                        "batch.stale",
		`{"model":{"source":"dir:/m"},"batch":{"stale":"delay","group_timeout":"1m","max_policy_lag":0}}`:    "checkpoint.publish_every_steps",
		`{"model":{"source":"dir:/m"},"checkpoint":{"dtype":"F8"}}`:                                          "checkpoint.dtype",
		`{"model":{"source":"dir:/m"},"checkpoint":{"publish_every_steps":3},"max_steps":2}`:                 "checkpoint.publish_every_steps",
		`{"model":{"source":"dir:/m"},"sampling":{"max_tokens":1}}`:                                          "sampling.max_tokens",
		`{"model":{"source":"dir:/m"},"objective":{"name":"cross_entropy"},"batch":{"group_timeout":"1s"}}`:  "batch.group_timeout",
		`{"model":{"source":"dir:/m"},"objective":{"tis_cap":2}}`:                                            "objective.tis_cap",
		`{"model":{"source":"dir:/m"},"optimizer":{"momentum":0.9}}`:                                         "optimizer.momentum",
		`{"model":{"source":"dir:/m"},"optimizer":{"schedule":{"name":"cosine"}}}`:                           "optimizer.schedule.decay_steps",
		`{"model":{"source":"dir:/m"},"objective":{"name":"dr_grpo"}}`:                                       "objective.max_completion_tokens",
		`{"model":{"source":"dir:/m","revision":"main"}}`:                                                    "model.revision",
		`{"model":{"source":"dir:/m"},"sampling":{"max_sequences":0,"max_tokens":8}}`:                        "sampling.max_tokens",
		`{"model":{"source":"dir:/m"},"checkpoint":{"keep_last":0,"keep_every":8}}`:                          "checkpoint.keep_every",
		`{"model":{"source":"dir:/m"},"optimizer":{"lr":1e-3,"lr":1e-6}}`:                                    "optimizer.lr",
		`{"model":{"source":"dir:/m"},"objective":{"reward_weights":{"a":1,"a":2}}}`:                         "objective.reward_weights",
		`{"model":{"source":"dir:/m"},"objective":{"name":"grpo","name":"gspo"}}`:                            "objective.name",
		`{"model":{"source":"dir:/m"},"name":"` + strings.Repeat("x", 201) + `"}`:                            "name",
		`[]`: "body",
	} {
		_, err := ParseSpec([]byte(doc))
		f, ok := fault.As(err)
		if !ok || f.Kind != fault.Invalid || f.Code != "invalid_job" {
			t.Errorf("%s: %v, expected an invalid_job fault", doc, err)
			continue
		}
		found := false
		for _, x := range f.Fields {
			found = found || x.Name == field
		}
		if !found {
			t.Errorf("%s: fields %v, expected %s", doc, f.Fields, field)
		}
	}
}

func FuzzParseSpec(f *testing.F) {
	f.Add([]byte(`{"model":{"source":"dir:/m"},"batch":{"max_policy_lag":null}}`))
	f.Add([]byte(`{"model":{"source":"job:job-0123456789abcdef@7"},"objective":{"name":"gspo"}}`))
	f.Add([]byte(`{"a":1,"a":2}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := ParseSpec(raw)
		if err != nil {
			if k := fault.KindOf(err); k != fault.Invalid && k != fault.Malformed {
				t.Errorf("kind %v of %v", k, err)
			}
			return
		}
		out, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseSpec(out)
		if err != nil {
			t.Fatalf("read back %s: %v", out, err)
		}
		if d := cmp.Diff(s, again); d != "" {
			t.Errorf("read back:\n%s", d)
		}
	})
}

// TestSpecLimits: a job's limits lower the server's, and one above it is refused
// rather than cut down.
func TestSpecLimits(t *testing.T) {
	server := Limits{MaxQueuedRollouts: 100, MaxQueuedTokens: 1000, MaxQueuedBytes: 10000}
	s, err := ParseSpec([]byte(`{"model":{"source":"dir:/m"},"limits":{"max_queued_rollouts":7,"max_queued_bytes":10001}}`))
	if err != nil {
		t.Fatal(err)
	}
	if l := s.Limits.queueLimits(server); l.MaxQueuedRollouts != 7 || l.MaxQueuedTokens != 1000 || l.MaxQueuedBytes != 10000 {
		t.Errorf("limits in force %+v", l)
	}
	f, _ := fault.As(s.Limits.within(server))
	if f == nil || f.Kind != fault.Invalid || len(f.Fields) != 1 || f.Fields[0].Name != "limits.max_queued_bytes" {
		t.Errorf("a limit above the server's gives %+v", f)
	}
}
