package server

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"trainerd/trainer"
)

// meters are the Prometheus metrics: those of HTTP are counted here, those of
// jobs are read from the manager when somebody asks.
type meters struct {
	registry *prometheus.Registry
	inFlight prometheus.Gauge
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	received *prometheus.CounterVec
	sent     *prometheus.CounterVec
}

func newMeters(m *trainer.Manager, version string) *meters {
	t := &meters{
		registry: prometheus.NewRegistry(),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{Name: "trainerd_http_requests_in_flight", Help: "Requests being answered."}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trainerd_http_requests_total", Help: "Requests answered."}, []string{"route", "method", "status"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "trainerd_http_request_seconds", Help: "Time to answer a request.",
			Buckets: []float64{.001, .005, .025, .1, .5, 2.5, 10, 60, 300}}, []string{"route", "method"}),
		received: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trainerd_http_received_bytes_total", Help: "Declared bytes of request bodies."}, []string{"route"}),
		sent:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trainerd_http_sent_bytes_total", Help: "Bytes of answer bodies."}, []string{"route"}),
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{Name: "trainerd_build_info", Help: "1, labelled with the version.", ConstLabels: prometheus.Labels{"version": version}})
	info.Set(1)
	t.registry.MustRegister(info, t.inFlight, t.requests, t.seconds, t.received, t.sent, &jobCollector{manager: m}, &nodeCollector{manager: m},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return t
}

func (t *meters) handler() http.Handler {
	return promhttp.HandlerFor(t.registry, promhttp.HandlerOpts{})
}

// jobMeter is one metric of every job.
type jobMeter struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(trainer.JobStats) float64
}

func counter(name, help string, value func(trainer.JobStats) float64) jobMeter {
	return jobMeter{prometheus.NewDesc(name, help, []string{"job"}, nil), prometheus.CounterValue, value}
}

func gauge(name, help string, value func(trainer.JobStats) float64) jobMeter {
	return jobMeter{prometheus.NewDesc(name, help, []string{"job"}, nil), prometheus.GaugeValue, value}
}

var jobMeters = []jobMeter{
	counter("trainerd_steps_total", "Optimizer steps done by this process.", func(s trainer.JobStats) float64 { return float64(s.Steps) }),
	counter("trainerd_step_seconds_total", "Time spent in optimizer steps.", func(s trainer.JobStats) float64 { return s.StepSeconds }),
	counter("trainerd_trained_tokens_total", "Tokens of trained completions.", func(s trainer.JobStats) float64 { return float64(s.TrainedTokens) }),
	counter("trainerd_sampled_tokens_total", "Tokens sampled.", func(s trainer.JobStats) float64 { return float64(s.SampledTokens) }),
	counter("trainerd_scored_tokens_total", "Tokens scored by logprobs requests.", func(s trainer.JobStats) float64 { return float64(s.ScoredTokens) }),
	counter("trainerd_checkpoints_published_total", "Checkpoints published by this process.", func(s trainer.JobStats) float64 { return float64(s.Published) }),
	counter("trainerd_checkpoint_seconds_total", "Time spent publishing.", func(s trainer.JobStats) float64 { return s.PublishSeconds }),
	counter("trainerd_checkpoint_bytes_total", "Bytes published.", func(s trainer.JobStats) float64 { return float64(s.PublishedBytes) }),
	counter("trainerd_checkpoint_capture_seconds_total", "Time the device stood still to capture checkpoints.", func(s trainer.JobStats) float64 { return s.Publication.Capture }),
	counter("trainerd_checkpoint_waits_total", "Times that a step waited for the publication before.", func(s trainer.JobStats) float64 { return float64(s.Publication.Waits) }),
	counter("trainerd_checkpoint_wait_seconds_total", "Time that steps waited for publications.", func(s trainer.JobStats) float64 { return s.Publication.WaitSeconds }),
	counter("trainerd_checkpoint_retries_total", "Tries to publish after the store failed.", func(s trainer.JobStats) float64 { return float64(s.Publication.Retries) }),
	counter("trainerd_checkpoints_synchronous_total", "Checkpoints written while training waited, for want of host memory.", func(s trainer.JobStats) float64 { return float64(s.Publication.Synchronous) }),
	gauge("trainerd_checkpoint_capture_bytes", "Host memory of the publication under way.", func(s trainer.JobStats) float64 { return float64(s.Publication.HostBytes) }),
	counter("trainerd_stale_delay_seconds_total", "Time that steps were put off for open groups that they would have made too stale.", func(s trainer.JobStats) float64 { return s.DelaySeconds }),
	counter("trainerd_batches_total", "Records of the job's spool.", func(s trainer.JobStats) float64 { return float64(s.Counts.Batches) }),
	counter("trainerd_rollouts_total", "Rollouts accepted.", func(s trainer.JobStats) float64 { return float64(s.Counts.Rollouts) }),
	counter("trainerd_rollout_duplicates_total", "Rollouts ignored because they were there before.", func(s trainer.JobStats) float64 { return float64(s.Counts.Duplicates) }),
	counter("trainerd_rollouts_without_policy_step_total", "Rollouts that did not say which step sampled them.", func(s trainer.JobStats) float64 { return float64(s.Counts.MissingPolicyStep) }),
	counter("trainerd_groups_trained_total", "Groups trained.", func(s trainer.JobStats) float64 { return float64(s.Counts.GroupsTrained) }),
	gauge("trainerd_step", "Optimizer steps of the policy.", func(s trainer.JobStats) float64 { return float64(s.Step) }),
	gauge("trainerd_policy_step", "Step of the newest checkpoint, -1 before the first.", func(s trainer.JobStats) float64 { return float64(s.PolicyStep) }),
	gauge("trainerd_queue_rollouts", "Rollouts that wait.", func(s trainer.JobStats) float64 { return float64(s.Queue.Rollouts) }),
	gauge("trainerd_queue_tokens", "Tokens that wait, each prompt once.", func(s trainer.JobStats) float64 { return float64(s.Queue.Tokens) }),
	gauge("trainerd_queue_bytes", "Payload in memory of what waits.", func(s trainer.JobStats) float64 { return float64(s.Queue.Bytes) }),
	gauge("trainerd_queue_groups_complete", "Complete groups that wait.", func(s trainer.JobStats) float64 { return float64(s.Queue.GroupsComplete) }),
	gauge("trainerd_queue_groups_open", "Groups that wait for rows.", func(s trainer.JobStats) float64 { return float64(s.Queue.GroupsOpen) }),
	counter("trainerd_swaps_in_total", "Times that the job's model came back to the device from host memory.", func(s trainer.JobStats) float64 { return float64(s.SwapsIn) }),
	counter("trainerd_swaps_out_total", "Times that the job's model left the device for another's.", func(s trainer.JobStats) float64 { return float64(s.SwapsOut) }),
	counter("trainerd_swap_seconds_total", "Time that the device spent on moving the job's model.", func(s trainer.JobStats) float64 { return s.SwapSeconds }),
	gauge("trainerd_resident", "1 while the job's model is on the device.", func(s trainer.JobStats) float64 {
		if s.Resident {
			return 1
		}
		return 0
	}),
	gauge("trainerd_memory_plan_bytes", "Device memory held by the job.", func(s trainer.JobStats) float64 { return float64(s.PlanBytes) }),
}

var (
	descJobs    = prometheus.NewDesc("trainerd_jobs", "Jobs by state.", []string{"state"}, nil)
	descRefused = prometheus.NewDesc("trainerd_groups_refused_total", "Groups refused by reason.", []string{"job", "reason"}, nil)
	descStale   = prometheus.NewDesc("trainerd_stale_groups_total", "Groups that lagged by more than max_policy_lag, or would have, by what was done.", []string{"job", "decision"}, nil)
	descFailing = prometheus.NewDesc("trainerd_job_failing", "1 while a job's work fails and is tried again, by the code of its last error.", []string{"job", "code"}, nil)
	descDisk    = prometheus.NewDesc("trainerd_data_disk_failing", "1 while the data directory takes no writes.", nil, nil)
	descDiskErr = prometheus.NewDesc("trainerd_data_disk_errors_total", "Writes to the data directory that failed.", nil, nil)
	descLost    = prometheus.NewDesc("trainerd_device_lost_total", "Times that the device was lost and given up.", nil, nil)
	descPins    = prometheus.NewDesc("trainerd_capture_pin_failures_total", "Memory of captures that the device refused to write to itself, so that captures take longer.", nil, nil)
	descSwapped = prometheus.NewDesc("trainerd_swapped_bytes", "Host memory of models that are off the device.", nil, nil)
	descDevice  = prometheus.NewDesc("trainerd_device_queue", "Pieces of device work that wait.", nil, nil)
)

// jobCollector reads the manager at each scrape.
type jobCollector struct{ manager *trainer.Manager }

// Describe implements prometheus.Collector.
func (*jobCollector) Describe(out chan<- *prometheus.Desc) {
	for _, m := range jobMeters {
		out <- m.desc
	}
	out <- descJobs
	out <- descRefused
	out <- descStale
	out <- descDevice
	out <- descFailing
	out <- descDisk
	out <- descDiskErr
	out <- descLost
	out <- descPins
	out <- descSwapped
}

// Collect implements prometheus.Collector.
func (c *jobCollector) Collect(out chan<- prometheus.Metric) {
	stats := c.manager.Stats()
	states := map[trainer.State]int{}
	for _, s := range []trainer.State{trainer.Loading, trainer.Waiting, trainer.Training, trainer.Paused, trainer.Finished, trainer.Failed, trainer.Cancelled} {
		states[s] = 0
	}
	for _, s := range stats.Jobs {
		states[s.State]++
		for _, m := range jobMeters {
			out <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(s), string(s.ID))
		}
		if s.Failing != "" {
			out <- prometheus.MustNewConstMetric(descFailing, prometheus.GaugeValue, 1, string(s.ID), s.Failing)
		}
		for decision, n := range map[string]int64{"admitted": s.Counts.Stale.Admitted, "delayed": s.Counts.Stale.Delayed, "rejected": s.Counts.Stale.Rejected} {
			out <- prometheus.MustNewConstMetric(descStale, prometheus.CounterValue, float64(n), string(s.ID), decision)
		}
		for reason, n := range s.Counts.GroupsRefused {
			out <- prometheus.MustNewConstMetric(descRefused, prometheus.CounterValue, float64(n), string(s.ID), reason)
		}
	}
	for state, n := range states {
		out <- prometheus.MustNewConstMetric(descJobs, prometheus.GaugeValue, float64(n), string(state))
	}
	failing := 0.0
	if stats.DiskFailing {
		failing = 1
	}
	out <- prometheus.MustNewConstMetric(descDisk, prometheus.GaugeValue, failing)
	out <- prometheus.MustNewConstMetric(descDiskErr, prometheus.CounterValue, float64(stats.DiskErrors))
	out <- prometheus.MustNewConstMetric(descLost, prometheus.CounterValue, float64(stats.DeviceLost))
	out <- prometheus.MustNewConstMetric(descPins, prometheus.CounterValue, float64(stats.PinFailures))
	out <- prometheus.MustNewConstMetric(descSwapped, prometheus.GaugeValue, float64(stats.SwapBytes))
	out <- prometheus.MustNewConstMetric(descDevice, prometheus.GaugeValue, float64(stats.DeviceQueue))
}
