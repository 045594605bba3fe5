//go:build interop

package arrowio

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// python is the interpreter with pyarrow: TRAINERD_PYTHON or the project's venv.
func python(t *testing.T) string {
	t.Helper()
	if p := os.Getenv("TRAINERD_PYTHON"); p != "" {
		return p
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(cache, "trainerd", "venv", "bin", "python")
}

// What is written here is what pyarrow reads, validated in full.
func TestPyarrowReadsWhatEncodeWrote(t *testing.T) {
	for _, codec := range []string{"", "lz4", "zstd"} {
		var buf bytes.Buffer
		b := goldenBatch()
		if err := Encode(&buf, b, codec); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "batch.arrow")
		if err := os.WriteFile(file, buf.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(python(t), filepath.Join("testdata", "goldens.py"), "--check", file)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			Meta    map[string]string
			Columns struct {
				GroupID    []string    `json:"group_id"`
				ID         []string    `json:"rollout_id"`
				Prompt     [][]int32   `json:"prompt_tokens"`
				Completion [][]int32   `json:"completion_tokens"`
				Format     []float64   `json:"reward_format"`
				LogProbs   [][]float32 `json:"sampler_logprobs"`
				Mask       [][]bool    `json:"loss_mask"`
				PolicyStep []*int64    `json:"policy_step"`
				Truncated  []bool      `json:"truncated"`
			}
		}
		if err := json.Unmarshal(out, &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(map[string]string{schemaKey: schemaVersion}, got.Meta); diff != "" {
			t.Fatal(diff)
		}
		c := got.Columns
		for i, r := range b.Rollouts {
			step := int64(-1)
			if c.PolicyStep[i] != nil {
				step = *c.PolicyStep[i]
			}
			read := r
			read.GroupID, read.ID, read.Prompt, read.Completion = c.GroupID[i], c.ID[i], c.Prompt[i], c.Completion[i]
			read.SamplerLogProbs, read.LossMask, read.PolicyStep, read.Truncated = c.LogProbs[i], c.Mask[i], step, c.Truncated[i]
			read.Components = []float64{c.Format[i], r.Components[1]}
			if diff := cmp.Diff(r, read); diff != "" {
				t.Fatalf("codec %q row %d: %s", codec, i, diff)
			}
		}
	}
}
