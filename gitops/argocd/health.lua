-- How Argo CD shows an AsyncRLJob: by its conditions alone, never by its phase, which is for people.
-- An object that is being deleted never gets here: Argo CD shows it as Progressing by itself.

local function condition(kind)
  for _, each in ipairs(obj.status.conditions or {}) do
    if each.type == kind then
      return each
    end
  end
  return nil
end

local function is_true(each)
  return each ~= nil and each.status == "True"
end

local function health(status, message)
  return { status = status, message = message or "" }
end

if obj.status == nil or obj.status.observedGeneration ~= obj.metadata.generation then
  return health("Progressing", "the operator has not seen this generation yet")
end

local ready, stalled, reconciling = condition("Ready"), condition("Stalled"), condition("Reconciling")

if is_true(stalled) then
  return health("Degraded", stalled.message)
end
if is_true(reconciling) then
  return health("Progressing", reconciling.message)
end
if is_true(condition("Suspended")) then
  return health("Suspended", ready and ready.message)
end
if ready ~= nil and ready.status == "Unknown" and ready.reason == "Queued" then
  return health("Suspended", ready.message)
end
if is_true(ready) then
  return health("Healthy", ready.message) -- also with reason Degraded: the job trains, and the message says what is wrong
end
return health("Progressing", ready and ready.message)
