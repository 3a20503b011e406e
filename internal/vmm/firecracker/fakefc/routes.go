package fakefc

import "encoding/json"

// routes are all requests that are known.
var routes map[string]route

// It is filled by init because handlers look routes up.
func init() {
	routes = map[string]route{
		"GET /":               {pre: true, post: true, run: (*machine).instanceInfo},
		"GET /version":        {pre: true, post: true, run: (*machine).getVersion},
		"GET /vm/config":      {pre: true, post: true, run: (*machine).getConfig},
		"GET /machine-config": {pre: true, post: true, run: func(m *machine, _ *query) (any, error) { return m.config.Machine, nil }},
		"PUT /machine-config": {pre: true, boot: true, body: machineConfig{HugePages: "None"}, run: (*machine).putMachine},
		"PATCH /machine-config": {
			pre: true, boot: true, body: machineUpdate{}, run: (*machine).patchMachine,
		},
		"PUT /boot-source": {pre: true, boot: true, body: bootSource{}, run: (*machine).putBoot},
		"PUT /cpu-config":  {pre: true, body: cpuConfig{}, run: accept},
		"PUT /logger":      {pre: true, body: loggerConfig{}, run: (*machine).putLogger},
		"PUT /metrics":     {pre: true, body: metricsConfig{}, run: (*machine).putMetrics},
		"PUT /serial":      {pre: true, since: "1.14", body: serialConfig{}, run: (*machine).putSerial},
		"PUT /actions":     {pre: true, post: true, body: action{}, run: (*machine).actions},
		"PATCH /vm":        {post: true, body: stateChange{}, run: (*machine).patchVM},

		"PUT /drives":    {pre: true, hot: true, boot: true, id: true, body: drive{Cache: "Unsafe"}, run: (*machine).putDrive},
		"PATCH /drives":  {post: true, id: true, body: driveUpdate{}, run: (*machine).patchDrive},
		"DELETE /drives": {hot: true, id: true, since: "1.16", run: (*machine).deleteDrive},
		"PUT /pmem":      {pre: true, hot: true, boot: true, id: true, since: "1.14", body: pmem{}, run: (*machine).putPmem},
		"PATCH /pmem":    {post: true, id: true, since: "1.16", body: pmemUpdate{}, run: accept},
		"DELETE /pmem":   {hot: true, id: true, since: "1.16", run: (*machine).deletePmem},
		"PUT /network-interfaces": {
			pre: true, hot: true, boot: true, id: true, body: netInterface{}, run: (*machine).putNetwork,
		},
		"PATCH /network-interfaces":  {post: true, id: true, body: netUpdate{}, run: (*machine).patchNetwork},
		"DELETE /network-interfaces": {hot: true, id: true, since: "1.16", run: (*machine).deleteNetwork},

		"PUT /vsock":                {pre: true, boot: true, body: vsockConfig{}, run: (*machine).putVsock},
		"PUT /entropy":              {pre: true, boot: true, body: entropy{}, run: (*machine).putEntropy},
		"PUT /balloon":              {pre: true, boot: true, body: balloon{}, run: (*machine).putBalloon},
		"PATCH /balloon":            {post: true, body: balloonUpdate{}, run: (*machine).patchBalloon},
		"PATCH /balloon/statistics": {post: true, body: balloonStatsUpdate{}, run: (*machine).patchBalloonStats},
		"PATCH /balloon/hinting":    {post: true, since: "1.14", body: hintingCommand{}, optional: true, run: (*machine).hinting},
		"GET /balloon/hinting":      {post: true, since: "1.14", run: (*machine).hintingStatus},
		"GET /balloon":              {pre: true, post: true, run: (*machine).getBalloon},
		"GET /balloon/statistics":   {post: true, run: (*machine).getBalloonStats},
		"PUT /hotplug/memory": {
			pre: true, boot: true, since: "1.14", body: memoryHotplug{}, run: (*machine).putHotplug,
		},
		"PATCH /hotplug/memory": {post: true, since: "1.14", body: memoryHotplugUpdate{}, run: noHotplug},
		"GET /hotplug/memory":   {post: true, since: "1.14", run: noHotplug},

		"PUT /mmds/config": {pre: true, boot: true, body: mmdsConfig{Version: "V1"}, run: (*machine).putMMDSConfig},
		"PUT /mmds":        {pre: true, post: true, body: json.RawMessage{}, run: (*machine).putMMDS},
		"PATCH /mmds":      {pre: true, post: true, body: json.RawMessage{}, run: (*machine).patchMMDS},
		"GET /mmds":        {pre: true, post: true, run: (*machine).getMMDS},

		"PUT /snapshot/create": {post: true, body: snapshotCreate{Type: "Full"}, run: (*machine).createSnapshot},
		"PUT /snapshot/load":   {pre: true, body: snapshotLoad{HugePages: "Snapshot"}, run: (*machine).loadSnapshot},
	}
}

// accept is for what changes nothing that can be seen from outside.
func accept(*machine, *query) (any, error) { return nil, nil }

func notThere(*machine, *query) (any, error) {
	return nil, fail("Device hotplug error: Device not found.")
}

func noHotplug(m *machine, _ *query) (any, error) {
	if m.config.Hotplug == nil {
		return nil, fail("Memory hotplug error: no device is configured.")
	}
	return nil, fail("Memory hotplug error: the device is not active.")
}
