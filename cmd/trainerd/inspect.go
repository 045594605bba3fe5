package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"trainerd/model"
	"trainerd/rollout"
	"trainerd/rollout/arrowio"
	"trainerd/storage"
)

func newInspect() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "inspect PATH",
		Short: "Describe a model (directory or .gguf), a checkpoint (its directory or manifest.json) or an Arrow rollout file",
		Args:  takes(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			doc, err := inspect(trimScheme(args[0]))
			if err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				return enc.Encode(doc)
			}
			return doc.print(cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&asJSON, "as-json", false, "print one JSON object")
	return cmd
}

// description is what inspect found, in the order in which it is printed.
type description []struct {
	Key   string
	Value any
}

func (d *description) add(key string, value any) {
	*d = append(*d, struct {
		Key   string
		Value any
	}{key, value})
}

func (d description) MarshalJSON() ([]byte, error) {
	m := map[string]any{}
	for _, e := range d {
		m[e.Key] = e.Value
	}
	return json.Marshal(m)
}

func (d description) print(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, e := range d {
		fmt.Fprintf(tw, "%s\t%v\n", e.Key, e.Value)
	}
	return tw.Flush()
}

func inspect(path string) (description, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	manifest := path
	if st.IsDir() {
		manifest = filepath.Join(path, "manifest.json")
	}
	switch {
	case strings.HasSuffix(manifest, "manifest.json") && exists(manifest):
		return inspectCheckpoint(manifest)
	case st.IsDir() || strings.HasSuffix(path, ".gguf"):
		return inspectModel(path)
	default:
		return inspectArrow(path, st.Size())
	}
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

func inspectModel(path string) (description, error) {
	src, opts, err := openModel(path)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	if err := model.CheckTensors(src); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	c := src.Config()
	var d description
	d.add("kind", "model")
	d.add("type", c.Type)
	d.add("parameters", parameters(src))
	d.add("tensors", len(src.Names()))
	d.add("dtype", src.DType())
	d.add("layers", c.Layers)
	d.add("hidden", c.Hidden)
	d.add("ffn", c.FFN)
	d.add("heads", c.Heads)
	d.add("kv_heads", c.KVHeads)
	d.add("head_dim", c.HeadDim)
	d.add("vocab", c.Vocab)
	d.add("max_positions", c.MaxPositions)
	d.add("rope_theta", c.RopeTheta)
	d.add("tied", c.Tied)
	d.add("eos", c.EOS)
	d.add("other_files", len(opts.Carried))
	if strings.HasSuffix(path, ".gguf") {
		return d, nil
	}
	switch from, err := storage.ReadPulled(path); {
	case err == nil:
		d.add("job", from.Job)
		d.add("step", from.Step)
	case !errors.Is(err, storage.ErrNotFound):
		return nil, err
	}
	return d, nil
}

func inspectCheckpoint(path string) (description, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	m, err := storage.DecodeManifest(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	var bytes int64
	bad := []string{}
	for _, f := range m.Files {
		bytes += f.Size
		if err := verifyFile(filepath.Join(filepath.Dir(path), filepath.FromSlash(f.Name)), f); err != nil {
			bad = append(bad, err.Error())
		}
	}
	var d description
	d.add("kind", "checkpoint")
	d.add("job", m.Job)
	d.add("step", m.Step)
	d.add("attempt", m.Attempt)
	d.add("engine", m.Engine)
	d.add("created", m.Created)
	d.add("snapshot", m.Snapshot)
	d.add("files", len(m.Files))
	d.add("bytes", bytes)
	if len(bad) > 0 {
		return nil, fmt.Errorf("checkpoint is damaged: %s", strings.Join(bad, "; "))
	}
	d.add("digests", "all match")
	return d, nil
}

func inspectArrow(path string, size int64) (description, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := arrowio.Decode(f, rollout.Schema{AnyComponent: true}, rollout.Limits{MaxBytes: max(16*size, 1<<30), MaxRows: 1 << 24, MaxTokens: 1 << 31,
		MaxPromptTokens: 1 << 24, MaxCompletionTokens: 1 << 24, Vocab: 1 << 30})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	groups := map[string]bool{}
	var prompt, completion, truncated int
	reward := 0.0
	for _, r := range b.Rollouts {
		groups[r.GroupID] = true
		prompt += len(r.Prompt)
		completion += len(r.Completion)
		reward += r.Reward
		if r.Truncated {
			truncated++
		}
	}
	var d description
	d.add("kind", "rollouts")
	d.add("rows", len(b.Rollouts))
	d.add("groups", len(groups))
	d.add("prompt_tokens", prompt)
	d.add("completion_tokens", completion)
	d.add("truncated", truncated)
	if b.HasReward {
		d.add("reward_mean", reward/float64(len(b.Rollouts)))
	}
	d.add("components", b.Components)
	return d, nil
}

// verifyFile compares a file's size and SHA-256 with the manifest's.
func verifyFile(path string, want storage.File) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return err
	}
	if n != want.Size {
		return fmt.Errorf("%s: %d bytes, expected %d", want.Name, n, want.Size)
	}
	if sum := hex.EncodeToString(h.Sum(nil)); sum != want.SHA256 {
		return fmt.Errorf("%s: SHA-256 %s, expected %s", want.Name, sum, want.SHA256)
	}
	return nil
}
