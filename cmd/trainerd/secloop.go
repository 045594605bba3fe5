package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/spf13/cobra"

	"trainerd/client"
	"trainerd/internal/fault"
	"trainerd/model"
	"trainerd/model/hf"
	"trainerd/model/tokenizer"
	"trainerd/secloop"
	"trainerd/secloop/field"
	"trainerd/secloop/loop"
	"trainerd/secloop/scenario"
	"trainerd/secloop/sim"
)

func newSecloop() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "secloop",
		Short: "Train, measure and run a policy of network defence against attacks on battle-fields",
		Long: "SecLoop: alerts become a prompt, the policy answers with strategies, each strategy meets the attack on a\n" +
			"battle-field of its own, and what happened is the reward. A client of the HTTP API; see docs/secloop.md.",
	}
	cmd.AddCommand(newSecloopRun(), newSecloopEval(), newSecloopServe(), newSecloopReplay(), newSecloopSweep(), newSecloopRounds())
	return cmd
}

// loopEnv is what all commands of the loop need: a server, a model, a field, a judge.
type loopEnv struct {
	con console

	server   string
	to       dial
	device   string
	fieldIs  string
	pace     time.Duration // how long an attack chain takes at least, in namespaces
	parallel int
	timeout  time.Duration

	modelIs   string // bytes, a Hugging Face directory, a GGUF file, or with a server what it can read
	tokenizer string
	prompt    string

	endpoint, endpointModel, endpointKey string
	judgeURL, judgeModel, judgeKey       string

	client *client.Client
	stop   func()
}

func (l *loopEnv) bindField(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&l.fieldIs, "field", "sim", "sim (in memory) or namespaces (Linux, as root)")
	f.IntVar(&l.parallel, "parallel", 0, "episodes at a time; 0: one per core with sim, 8 with namespaces")
	f.DurationVar(&l.timeout, "episode-timeout", 30*time.Second, "longest time of one episode")
}

func (l *loopEnv) bindPolicy(cmd *cobra.Command, defaultModel string) {
	f := cmd.Flags()
	f.StringVar(&l.server, "server", "", "address of a server; default: one inside this process, on loopback")
	f.StringVar(&l.device, "device", "cpu", "of the server inside this process: cpu, cuda:N or auto")
	f.StringVar(&l.modelIs, "model", defaultModel, "bytes (a small byte-level model), a Hugging Face directory or a GGUF file; with --server what the server reads (dir:PATH, s3://..., job:ID@STEP)")
	f.StringVar(&l.tokenizer, "tokenizer", "", "directory with tokenizer.json; default: the model's own")
	f.StringVar(&l.prompt, "prompt", "auto", "terse; chat, with tools and environment; brief, chat without them; or auto: chat where the tokenizer has chat tokens")
	f.StringVar(&l.endpoint, "endpoint", "", "sample from this OpenAI-compatible address (.../v1) instead of the server")
	f.StringVar(&l.endpointModel, "endpoint-model", "", "name of the policy there")
	f.StringVar(&l.endpointKey, "endpoint-key-env", "", "environment variable with its API key")
	l.to.bind(cmd)
}

func (l *loopEnv) bindJudge(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&l.judgeURL, "judge-url", "", "ask this OpenAI-compatible address (.../v1) for the rationality of strategies; default: rules")
	f.StringVar(&l.judgeModel, "judge-model", "", "name of the judge's model")
	f.StringVar(&l.judgeKey, "judge-key-env", "", "environment variable with its API key")
}

// keyFrom reads an API key from the environment variable of that name; "" names none.
func keyFrom(flag, variable string) (string, error) {
	if variable == "" {
		return "", nil
	}
	key := os.Getenv(variable)
	if key == "" {
		return "", fault.BadField(flag, variable, "the name of an environment variable that holds the key")
	}
	return key, nil
}

// openField opens the chosen battle-field.
func (l *loopEnv) openField() (loop.Field, func(), error) {
	switch l.fieldIs {
	case "sim":
		if l.parallel <= 0 {
			l.parallel = runtime.NumCPU()
		}
		return sim.Field{}, func() {}, nil
	case "namespaces":
		if l.parallel <= 0 {
			l.parallel = 8
		}
		f, err := field.Open(field.Options{Parallel: l.parallel, Pace: l.pace})
		if err != nil {
			return nil, nil, err
		}
		return f, func() { f.Close() }, nil
	}
	return nil, nil, fault.BadField("field", l.fieldIs, "sim or namespaces")
}

// judge returns the judge that the flags ask for.
func (l *loopEnv) judge() (secloop.Rater, error) {
	if l.judgeURL == "" {
		if l.judgeModel != "" || l.judgeKey != "" {
			return nil, fault.BadField("judge-url", `""`, "an address, since --judge-model or --judge-key-env is given")
		}
		return func(_ context.Context, a secloop.Alert, s secloop.Strategy) (float64, error) {
			return scenario.Judge{}.Rationality(a, s), nil
		}, nil
	}
	key, err := keyFrom("judge-key-env", l.judgeKey)
	if err != nil {
		return nil, err
	}
	j, err := loop.NewLLMJudge(loop.LLMJudgeOptions{URL: l.judgeURL, Model: l.judgeModel, Key: key, Environment: loop.Environment()})
	if err != nil {
		return nil, err
	}
	return j.Rate, nil
}

// sampler returns the endpoint's sampler, nil where the server samples.
func (l *loopEnv) sampler(maxTokens int, temperature float64) (secloop.Sampler, error) {
	if l.endpoint == "" {
		if l.endpointModel != "" || l.endpointKey != "" {
			return nil, fault.BadField("endpoint", `""`, "an address, since --endpoint-model or --endpoint-key-env is given")
		}
		return nil, nil
	}
	key, err := keyFrom("endpoint-key-env", l.endpointKey)
	if err != nil {
		return nil, err
	}
	o, err := loop.NewOpenAI(loop.OpenAIOptions{URL: l.endpoint, Model: l.endpointModel, Key: key, MaxTokens: maxTokens, Temperature: temperature})
	if err != nil {
		return nil, err
	}
	return o, nil
}

// connect finds the server, or starts one whose data lie in dir.
func (l *loopEnv) connect(ctx context.Context, dir string) error {
	if l.server != "" {
		o, err := l.to.options(os.Getenv)
		if err != nil {
			return err
		}
		l.stop = func() {}
		l.client, err = client.New(l.server, o)
		return err
	}
	cfg := DefaultConfig()
	cfg.Listen, cfg.Device = "127.0.0.1:0", l.device
	cfg.Data, cfg.Store = filepath.Join(dir, "data"), "dir:"+filepath.Join(dir, "store")
	p := &Program{Config: cfg, Log: l.con.log}
	if err := p.Start(ctx); err != nil {
		return err
	}
	l.stop = func() {
		stop, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := p.Close(stop); err != nil {
			l.con.log.Error("stop the server", "error", err)
		}
	}
	var err error
	if l.client, err = client.New(p.URL(), client.Options{}); err != nil {
		l.stop()
	}
	return err
}

// policy is a model that the loop can speak to.
type policy struct {
	source string // as the server names it
	form   loop.Form
	codec  *tokenizer.Tokenizer
	eos    int32
	chat   bool
}

// openPolicy makes or imports the model where that is needed, into dir, and loads its tokenizer.
func (l *loopEnv) openPolicy(ctx context.Context, dir string, seed uint64) (policy, error) {
	var p policy
	files := l.tokenizer
	switch made := filepath.Join(dir, "model"); {
	case l.modelIs == "": // an endpoint or a server's job has it
		if files == "" {
			return p, fault.BadField("model", `""`, "a model, or --tokenizer with what samples elsewhere (--endpoint, --server with --job)")
		}
	case l.server != "" && l.modelIs != "bytes":
		p.source = l.modelIs
		if files == "" {
			return p, fault.BadField("tokenizer", `""`, "a directory with the tokenizer.json of "+l.modelIs+", which only the server can read")
		}
	case l.modelIs == "bytes", filepath.Ext(l.modelIs) == ".gguf":
		if _, err := os.Stat(filepath.Join(made, "config.json")); errors.Is(err, fs.ErrNotExist) {
			if err := l.makeModel(ctx, made, seed); err != nil {
				return p, err
			}
		}
		abs, err := filepath.Abs(made)
		if err != nil {
			return p, err
		}
		p.source = "dir:" + abs
		if files == "" {
			files = made
		}
	default:
		abs, err := filepath.Abs(trimScheme(l.modelIs))
		if err != nil {
			return p, err
		}
		p.source = "dir:" + abs
		if files == "" {
			files = abs
		}
	}
	var err error
	if p.codec, err = tokenizer.Load(files); err != nil {
		return p, err
	}
	_, canChat := p.codec.ID("<|im_end|>")
	switch l.prompt {
	case "auto":
		p.chat = canChat
	case "terse":
	case "chat", "brief":
		p.chat = true
	default:
		return p, fault.BadField("prompt", l.prompt, "terse, chat, brief or auto")
	}
	p.form = loop.Terse{}
	end := func() (int32, bool) { return p.codec.Special("eos_token") }
	if p.chat {
		p.form = loop.Chat{Render: p.codec.ChatML, Open: `[{"tool":"`, Brief: l.prompt == "brief"}
		end = func() (int32, bool) { return p.codec.ID("<|im_end|>") }
	}
	var ok bool
	if p.eos, ok = end(); !ok {
		return p, fault.BadField("tokenizer", files, "a tokenizer with an end token")
	}
	return p, nil
}

// makeModel writes the byte-level model or imports a GGUF file.
func (l *loopEnv) makeModel(ctx context.Context, to string, seed uint64) error {
	if l.modelIs == "bytes" {
		src, err := model.NewRandom(byteModel(), seed)
		if err != nil {
			return err
		}
		return hf.Write(ctx, hf.DirSink(to), "", src, hf.WriteOptions{Carried: byteTokenizer()})
	}
	src, opts, err := openModel(l.modelIs)
	if err != nil {
		return err
	}
	defer src.Close()
	if err := hf.Write(ctx, l.con.sinkWithProgress(hf.DirSink(to), 4*parameters(src)), "", src, opts); err != nil {
		return fmt.Errorf("import %s: %w", l.modelIs, err)
	}
	return nil
}

// agent returns an agent for a policy; its sampler is nil where the server samples.
func (l *loopEnv) agent(p policy, f loop.Field, maxTokens int, temperature float64) (*loop.Agent, error) {
	rate, err := l.judge()
	if err != nil {
		return nil, err
	}
	s, err := l.sampler(maxTokens, temperature)
	if err != nil {
		return nil, err
	}
	a := &loop.Agent{Codec: p.codec, Form: p.form, Field: f, Rate: rate, Parallel: l.parallel, Timeout: l.timeout, Cache: l.fieldIs == "sim",
		Report: func(format string, args ...any) { l.con.log.Warn(fmt.Sprintf(format, args...)) }}
	if s != nil {
		a.Sampler = s
	}
	return a, nil
}

// newLoopConsole logs warnings only: what a command says goes to its output.
func newLoopConsole(cmd *cobra.Command) console { return newQuietConsole(cmd, slog.LevelWarn) }
